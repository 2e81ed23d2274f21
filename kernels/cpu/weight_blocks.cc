#include "kernels/cpu/weight_blocks.h"

#include <cstring>

namespace espalier {
namespace {

#include "kernels/cpu/half.h"

constexpr int kLanes = kStripOutputs;

const uint8_t* BlockAt(const uint8_t* strip, int bits, int group) {
  return strip + int64_t{group} * BlockBytes(bits);
}

}  // namespace

bool PackBlock(const KernelTable& kernels, int bits, const float (*values)[kLanes], int depth,
               uint8_t* block) {
  if (bits != 32) return kernels.pack_integers(bits, values, depth, block);
  const int64_t bytes = depth * int64_t{sizeof(values[0])};
  std::memcpy(block, values, bytes);
  std::memset(block + bytes, 0, BlockBytes(bits) - bytes);
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
