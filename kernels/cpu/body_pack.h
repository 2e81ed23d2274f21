// Integers for a block of a weight, and strips of what lies in others. Included once by each
// kernels_*.cc, after half.h and the lanes; every instruction set gives the same bits.
#pragma once

constexpr int kInt8Levels = 240;  // 16 * 15: a source of 15 steps lies on them
constexpr int kInt4Levels = 15;
constexpr float kHalfway = 12582912.0f;  // 1.5 * 2^23: no room is left for a fraction

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

float Nearest(float v, const Steps& steps) {
  const float u = (v - steps.minimum) * steps.inverse() + kHalfway - kHalfway;
  return u < 0 ? 0 : u > kInt4Levels ? kInt4Levels : u;
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

  float operator[](int k) const { return first[k * kStripOutputs]; }
};

// The largest distance of a value to the nearest step, in steps.
float Misfit(const Values& values, const Steps& steps) {
  float worst = 0;
  for (int k = 0; k < values.depth; ++k) {
    const float error = __builtin_fabsf(ErrorOf(values[k], steps));
    worst = error > worst ? error : worst;
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
  constexpr float kShares[] = {1.0f, 0.9f, 0.8f};  // of the range
  for (const float share : kShares) {
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

// See KernelTable::pack_integers.
bool PackIntegers(int bits, const float (*values)[kStripOutputs], int depth, uint8_t* block) {
  F min = Load(values[0]), max = min;
  for (int k = 1; k < depth; ++k) {
    const F v = Load(values[k]);
    min = Min(v, min);
    max = Max(v, max);
  }
  const auto levels = static_cast<float>(bits == 8 ? kInt8Levels : kInt4Levels);
  constexpr float kLargest = 3.40282347e38f;
  float scale[kStripOutputs], minimum[kStripOutputs], inverse[kStripOutputs];
  float least[kStripOutputs], most[kStripOutputs];
  Store(least, min);
  Store(most, max);
  bool fits = true;
  for (int lane = 0; lane < kStripOutputs; ++lane) {
    const float range = most[lane] - least[lane];  // may be infinite, and then does not fit
    const Steps steps = Rounded(range / levels, least[lane]);
    fits &= __builtin_fabsf(steps.minimum) <= kLargest && steps.scale <= kLargest;
    scale[lane] = steps.scale;
    minimum[lane] = steps.minimum;
    inverse[lane] = steps.inverse();
  }
  if (!fits) return false;
  alignas(64) float u[kGroup][kStripOutputs] = {};
  float worst[kStripOutputs];
  {
    const F steps = Load(scale), lowest = Load(minimum), inverses = Load(inverse);
    F misfit = Set1(0);
    for (int k = 0; k < depth; ++k) {
      const F above = Load(values[k]) - lowest;
      const F nearest = Min(Max(Round(above * inverses), Set1(0)), Set1(levels));
      Store(u[k], nearest);
      misfit = Max(misfit, Abs(above - steps * nearest));
    }
    Store(worst, misfit);
  }
  uint16_t halves[2][kStripOutputs];
  for (int lane = 0; lane < kStripOutputs; ++lane) {
    Steps steps = {scale[lane], minimum[lane]};
    if (bits == 4 && steps.scale > 0 && worst[lane] / steps.scale >= kOnSteps) {
      const Values mine = {values[0] + lane, depth};
      steps = FitInt4(mine, least[lane], most[lane]);
      for (int k = 0; k < depth; ++k) u[k][lane] = Nearest(mine[k], steps);
    }
    halves[0][lane] = ToHalf(steps.scale);
    halves[1][lane] = ToHalf(steps.minimum);
  }
  __builtin_memcpy(block, halves, kBlockHeader);
  uint32_t quads[kGroup / 4][kStripOutputs];
  for (int quad = 0; quad < kGroup / 4; ++quad) {
    const float(*of)[kStripOutputs] = u + 4 * quad;
    for (int lane = 0; lane < kStripOutputs; ++lane) {
      quads[quad][lane] = static_cast<int>(of[0][lane]) | static_cast<int>(of[1][lane]) << 8 |
                          static_cast<int>(of[2][lane]) << 16 | static_cast<int>(of[3][lane]) << 24;
    }
  }
  if (bits == 4) {
    for (int quad = 0; quad < kGroup / 8; ++quad) {
      for (int lane = 0; lane < kStripOutputs; ++lane) {
        quads[quad][lane] |= quads[quad + kGroup / 8][lane] << 4;
      }
    }
  }
  __builtin_memcpy(block + kBlockHeader, quads, BlockBytes(bits) - kBlockHeader);
  return true;
}

template <int kBits>
void GatherInputs(const uint8_t* strip, int groups, const int32_t* inputs, int count, float* steps,
                  uint8_t* to) {
  constexpr int kLevels = kBits == 8 ? kInt8Levels : kInt4Levels;
  constexpr int64_t kBlock = BlockBytes(kBits);
  constexpr int kLine = 4 * kStripOutputs;  // a quad of each output
  uint16_t halves[2][kStripOutputs];
  float inverse[kStripOutputs], lowest[kStripOutputs];
  {
    F least = Set1(0), most = Set1(0);
    for (int g = 0; g < groups; ++g) {
      const auto* header = reinterpret_cast<const uint16_t*>(strip + g * kBlock);
      const F first = LoadHalf(header + kStripOutputs);
      const F last = first + LoadHalf(header) * Set1(kLevels);  // below it by a negative scale
      least = g == 0 ? Min(first, last) : Min(Min(first, last), least);
      most = g == 0 ? Max(first, last) : Max(Max(first, last), most);
    }
    float low[kStripOutputs], high[kStripOutputs];
    Store(low, least);
    Store(high, most);
    for (int lane = 0; lane < kStripOutputs; ++lane) {
      const Steps of = Rounded((high[lane] - low[lane]) / kInt8Levels, low[lane]);
      halves[0][lane] = ToHalf(of.scale);
      halves[1][lane] = ToHalf(of.minimum);
      inverse[lane] = of.inverse();
      lowest[lane] = of.minimum;
    }
  }
  // What u becomes in the new steps: a line for each group, [scale, offset][output].
  for (int g = 0; g < groups; ++g) {
    const auto* header = reinterpret_cast<const uint16_t*>(strip + g * kBlock);
    float* line = steps + int64_t{g} * 2 * kStripOutputs;
    Store(line, LoadHalf(header) * Load(inverse));
    Store(line + kStripOutputs, (LoadHalf(header + kStripOutputs) - Load(lowest)) * Load(inverse));
  }
  for (int at = 0; at < count; at += kGroup, to += BlockBytes(8)) {
    __builtin_memcpy(to, halves, kBlockHeader);
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      F four[4];
      for (int i = 0; i < 4; ++i) {
        if (at + 4 * quad + i >= count) {
          four[i] = Set1(0);
          continue;
        }
        const int input = inputs[at + 4 * quad + i];
        const int g = input / kGroup, k = input % kGroup;
        const int of_quad = kBits == 8 ? k / 4 : k / 4 % 4;
        const int shift = 8 * (k % 4) + (kBits == 4 && k >= kGroup / 2 ? 4 : 0);
        const float* line = steps + int64_t{g} * 2 * kStripOutputs;
        const F u = LoadField(strip + g * kBlock + kBlockHeader + of_quad * kLine, shift,
                              kBits == 8 ? 255 : 15);
        const F near = u * Load(line) + Load(line + kStripOutputs);
        four[i] = Min(Max(near, Set1(0)), Set1(kInt8Levels));  // steps are rounded, or infinite
      }
      StoreQuads(to + kBlockHeader + quad * kLine, four);
    }
  }
}

// See KernelTable::gather_integers.
void GatherIntegers(int bits, const uint8_t* strip, int groups, const int32_t* inputs, int count,
                    float* steps, uint8_t* to) {
  (bits == 8 ? GatherInputs<8> : GatherInputs<4>)(strip, groups, inputs, count, steps, to);
}

// See KernelTable::gather_outputs.
void GatherOutputs(int bits, const uint8_t* blocks, int64_t strip_bytes, const int32_t* outputs,
                   int groups, uint8_t* to) {
  const int64_t block = BlockBytes(bits);
  int32_t lanes[kStripOutputs];
  for (int i = 0; i < kStripOutputs; ++i) lanes[i] = outputs[i] % kStripOutputs;
  for (int begin = 0, end; begin < kStripOutputs; begin = end) {
    const int strip = outputs[begin] / kStripOutputs;
    for (end = begin + 1; end < kStripOutputs && outputs[end] / kStripOutputs == strip;) ++end;
    const Picks picks = PickLanes(lanes, begin, end);
    const uint8_t* source = blocks + strip * strip_bytes;
    uint8_t* line = to;
    for (int g = 0; g < groups; ++g, source += block, line += block) {
      int64_t at = 0;
      for (; bits <= 8 && at < kBlockHeader; at += kBlockHeader / 2) {
        PickHalves(picks, source + at, line + at);
      }
      for (; at < block; at += 4 * kStripOutputs) PickWords(picks, source + at, line + at);
    }
  }
}
