#include "kernels/cpu/weight_blocks.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace espalier {
namespace {

#include "kernels/cpu/half.h"

constexpr int kLanes = kStripOutputs;
constexpr int kInt8Levels = 240;  // 16 * 15: a source of 15 steps lies on them
constexpr int kInt4Levels = 15;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: no room is left for a fraction

// What the integers of one group and output are multiples of, as fp16 holds it.
struct Steps {
  float scale = 0;
  float minimum = 0;

  float inverse() const { return scale > 0 ? 1 / scale : 0; }
};

Steps Rounded(float scale, float minimum) {
  uint16_t half = ToHalf(scale);
  // A subnormal one has few bits: rounded down, its steps would not reach the largest value.
  constexpr uint16_t kFirstNormal = 0x0400;
  constexpr float kNoise = 1 - 1e-6f;  // of a scale that a source had and fp32 arithmetic touched
  if (half < kFirstNormal && FromHalf(half) < scale * kNoise) ++half;
  return {FromHalf(half), FromHalf(ToHalf(minimum))};
}

float Clamp(float u, float levels) { return std::min(std::max(u, 0.0f), levels); }

float Nearest(float v, const Steps& steps) {
  return Clamp((v - steps.minimum) * steps.inverse() + kRounder - kRounder, kInt4Levels);
}

float ErrorOf(float v, const Steps& steps) {
  return v - steps.minimum - steps.scale * Nearest(v, steps);
}

// Values this close to steps, in steps, are a source's: fp16 rounding of the minimum shifts them
// all.
constexpr float kOnSteps = 0.02f;

// One output's values in a block that is being packed.
struct Values {
  const float* first;
  int depth;

  float operator[](int k) const { return first[k * kLanes]; }
};

// The largest distance of a value to the nearest step, in steps.
float Misfit(const Values& values, const Steps& steps) {
  float worst = 0;
  for (int k = 0; k < values.depth; ++k) {
    worst = std::max(worst, std::fabs(ErrorOf(values[k], steps)));
  }
  return steps.scale > 0 ? worst / steps.scale : 0;
}

float SquaredError(const Values& values, const Steps& steps) {
  float sum = 0;
  for (int k = 0; k < values.depth; ++k) {
    const float error = ErrorOf(values[k], steps);
    sum += error * error;
  }
  return sum;
}

// Scale and minimum for which the integers that `steps` gives fit the values best.
Steps Refit(const Values& values, const Steps& steps) {
  double u1 = 0, u2 = 0, v1 = 0, uv = 0;
  for (int k = 0; k < values.depth; ++k) {
    const double v = values[k];
    const double u = Nearest(values[k], steps);
    u1 += u;
    u2 += u * u;
    v1 += v;
    uv += u * v;
  }
  const double spread = values.depth * u2 - u1 * u1;
  if (spread <= 0) return steps;
  const double scale = (values.depth * uv - u1 * v1) / spread;
  if (!(scale > 0)) return steps;
  return Rounded(static_cast<float>(scale), static_cast<float>((v1 - scale * u1) / values.depth));
}

// Steps of 4 bits for values whose range is no fifteen steps of a source.
Steps FitInt4(const Values& values, float min, float max) {
  for (int levels = kInt4Levels - 1; levels > 0; --levels) {
    const Steps steps = Rounded((max - min) / static_cast<float>(levels), min);
    if (Misfit(values, steps) < kOnSteps) return steps;
  }
  Steps best = Rounded((max - min) / kInt4Levels, min);
  float least = SquaredError(values, best);
  for (const float share : {1.0f, 0.9f, 0.8f}) {
    const float cut = (1 - share) / 2 * (max - min);
    Steps steps = Rounded(share * (max - min) / kInt4Levels, min + cut);
    for (int turn = 0; turn < 3; ++turn) {
      steps = Refit(values, steps);
      const float error = SquaredError(values, steps);
      if (error < least) {
        least = error;
        best = steps;
      }
    }
  }
  return best;
}

const uint8_t* BlockAt(const uint8_t* strip, int bits, int group) {
  return strip + int64_t{group} * BlockBytes(bits);
}

}  // namespace

bool PackBlock(int bits, const float (*values)[kLanes], int depth, uint8_t* block) {
  if (bits == 32) {
    const int64_t bytes = depth * int64_t{sizeof(values[0])};
    std::memcpy(block, values, bytes);
    std::memset(block + bytes, 0, BlockBytes(bits) - bytes);
    return true;
  }
  // Lanes are the inner loops', so that they become vectors.
  float min[kLanes], max[kLanes];
  std::copy_n(values[0], kLanes, min);
  std::copy_n(values[0], kLanes, max);
  for (int k = 1; k < depth; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) {
      min[lane] = std::min(min[lane], values[k][lane]);
      max[lane] = std::max(max[lane], values[k][lane]);
    }
  }
  const auto levels = static_cast<float>(bits == 8 ? kInt8Levels : kInt4Levels);
  float scale[kLanes], minimum[kLanes], inverse[kLanes], worst[kLanes] = {};
  bool fits = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float range = max[lane] - min[lane];  // may be infinite, and then does not fit
    const Steps steps = Rounded(range / levels, min[lane]);
    fits &= std::fabs(steps.minimum) <= FLT_MAX && steps.scale <= FLT_MAX;
    scale[lane] = steps.scale;
    minimum[lane] = steps.minimum;
    inverse[lane] = steps.inverse();
  }
  if (!fits) return false;
  float u[kGroup][kLanes] = {};
  for (int k = 0; k < depth; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float above = values[k][lane] - minimum[lane];
      u[k][lane] = Clamp(above * inverse[lane] + kRounder - kRounder, levels);
      worst[lane] = std::max(worst[lane], std::fabs(above - scale[lane] * u[k][lane]));
    }
  }
  uint16_t halves[2][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    Steps steps = {scale[lane], minimum[lane]};
    if (bits == 4 && steps.scale > 0 && worst[lane] / steps.scale >= kOnSteps) {
      const Values mine = {values[0] + lane, depth};
      steps = FitInt4(mine, min[lane], max[lane]);
      for (int k = 0; k < depth; ++k) u[k][lane] = Nearest(mine[k], steps);
    }
    halves[0][lane] = ToHalf(steps.scale);
    halves[1][lane] = ToHalf(steps.minimum);
  }
  std::memcpy(block, halves, kBlockHeader);
  uint32_t quads[kGroup / 4][kLanes];
  for (int quad = 0; quad < kGroup / 4; ++quad) {
    const float(*of)[kLanes] = u + 4 * quad;
    for (int lane = 0; lane < kLanes; ++lane) {
      quads[quad][lane] = static_cast<int>(of[0][lane]) | static_cast<int>(of[1][lane]) << 8 |
                          static_cast<int>(of[2][lane]) << 16 | static_cast<int>(of[3][lane]) << 24;
    }
  }
  if (bits == 4) {
    for (int quad = 0; quad < kGroup / 8; ++quad) {
      for (int lane = 0; lane < kLanes; ++lane) {
        quads[quad][lane] |= quads[quad + kGroup / 8][lane] << 4;
      }
    }
  }
  std::memcpy(block + kBlockHeader, quads, BlockBytes(bits) - kBlockHeader);
  return true;
}

void CopyOutput(int bits, const uint8_t* from, int from_lane, int groups, uint8_t* to, int lane) {
  for (int group = 0; group < groups; ++group) {
    const uint8_t* source = BlockAt(from, bits, group);
    uint8_t* block = to + int64_t{group} * BlockBytes(bits);
    int64_t at = 0;
    if (bits != 32) {
      std::memcpy(block + 2 * lane, source + 2 * from_lane, 2);
      std::memcpy(block + 2 * (kLanes + lane), source + 2 * (kLanes + from_lane), 2);
      at = kBlockHeader;
    }
    for (; at < BlockBytes(bits); at += 4 * kLanes) {
      std::memcpy(block + at + 4 * lane, source + at + 4 * from_lane, 4);
    }
  }
}

void UnpackOutput(int bits, const uint8_t* strip, int lane, int depth, float* out) {
  for (int k = 0; k < depth; ++k) {
    const uint8_t* block = BlockAt(strip, bits, k / kGroup);
    const int i = k % kGroup, quad = i / 4;
    if (bits == 32) {
      std::memcpy(out + k, block + (i * kLanes + lane) * sizeof(float), sizeof(float));
      continue;
    }
    uint16_t scale, minimum;
    std::memcpy(&scale, block + 2 * lane, 2);
    std::memcpy(&minimum, block + 2 * (kLanes + lane), 2);
    const uint8_t* values = block + kBlockHeader + 4 * lane + i % 4;
    const int u = bits == 8 ? values[quad * 4 * kLanes]
                            : values[quad % 4 * 4 * kLanes] >> (quad >= 4 ? 4 : 0) & 15;
    out[k] = static_cast<float>(double{FromHalf(scale)} * u + FromHalf(minimum));
  }
}

}  // namespace espalier
