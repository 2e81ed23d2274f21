#include "kernels/cpu/weight_blocks.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace espalier {
namespace {

#include "kernels/cpu/half.h"

constexpr int kLanes = kStripOutputs;

// Rounds to nearest even; infinite if v is nearer to 2^128 than to the largest value.
uint16_t ToBf16(float v) {
  const uint32_t even = ToBits(v) >> 16 & 1;
  return static_cast<uint16_t>((ToBits(v) + 0x7fff + even) >> 16);
}
float FromBf16(uint16_t v) { return FromBits(uint32_t{v} << 16); }

bool PackBf16(const float (*values)[kLanes], int depth, uint8_t* block) {
  bool fits = true;
  uint16_t pairs[kGroup / 2][kLanes][2] = {};
  for (int k = 0; k < depth; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint16_t v = ToBf16(values[k][lane]);
      fits &= std::fabs(FromBf16(v)) <= FLT_MAX;
      pairs[k / 2][lane][k % 2] = v;
    }
  }
  std::memcpy(block, pairs, sizeof pairs);
  return fits;
}

const uint8_t* BlockAt(const uint8_t* strip, int bits, int group) {
  return strip + int64_t{group} * BlockBytes(bits);
}

}  // namespace

bool PackBlock(const KernelTable& kernels, int bits, const float (*values)[kLanes], int depth,
               uint8_t* block) {
  if (bits == 16) return PackBf16(values, depth, block);
  if (bits != 32) return kernels.pack_integers(bits, values, depth, block);
  const int64_t bytes = depth * int64_t{sizeof(values[0])};
  std::memcpy(block, values, bytes);
  std::memset(block + bytes, 0, BlockBytes(bits) - bytes);
  return true;
}

bool PackGroups(std::span<const FourBitGroup> groups, int lane, uint8_t* strip) {
  constexpr uint16_t kExponent = 0x7c00;  // all ones: not finite
  bool finite = true;
  uint8_t* block = strip;
  for (const FourBitGroup& group : groups) {
    finite &= (group.scale & kExponent) != kExponent && (group.minimum & kExponent) != kExponent;
    std::memcpy(block + 2 * lane, &group.scale, 2);
    std::memcpy(block + 2 * (kLanes + lane), &group.minimum, 2);
    for (int quad = 0; quad < 4; ++quad) {
      std::memcpy(block + kBlockHeader + 4 * (quad * kLanes + lane), group.u + 4 * quad, 4);
    }
    block += BlockBytes(4);
  }
  return finite;
}

void GatherInputs(const KernelTable& kernels, int bits, const uint8_t* strip, int groups,
                  std::span<const int32_t> inputs, float* steps, uint8_t* to) {
  const int count = static_cast<int>(inputs.size());
  if (bits <= 8) {
    return kernels.gather_integers(bits, strip, groups, inputs.data(), count, steps, to);
  }
  std::memset(to, 0, GroupsOf(count) * BlockBytes(bits));
  const int wide = 32 / bits;  // inputs that lie together
  for (int i = 0; i < count; ++i) {
    const uint8_t* const from = strip + inputs[i] / wide * 4 * int64_t{kLanes};
    uint8_t* const line = to + i / wide * 4 * int64_t{kLanes};
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(line + 4 * lane + i % wide * (4 / wide),
                  from + 4 * lane + inputs[i] % wide * (4 / wide), 4 / wide);
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
    if (bits == 16) {
      uint16_t v;
      std::memcpy(&v, block + i / 2 * 4 * kLanes + 4 * lane + i % 2 * 2, 2);
      out[k] = FromBf16(v);
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
