// Blocks of 16 outputs by 32 summed values, of which the CPU's weights are made.
//
// A strip is the blocks of 16 outputs, group after group. A product reads strips from end to end, a
// block as it lies: no transposition is left to do. Layouts, kGroup = 32 values k in 8 quads:
//   32 bits: float [32][16].
//   16 bits: bf16 [16 pairs][16 outputs][2].
//    8 bits: fp16 scale[16], fp16 minimum[16], then uint8 [8 quads][16 outputs][4].
//    4 bits: the same two, then uint8 [4][16 outputs][4]: quad j in the low nibbles, quad j + 4 in
//            the high ones.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/cpu/kernel_table.h"
#include "kernels/weight.h"

namespace espalier {

constexpr int BitsOf(WeightType type) {
  constexpr int kBits[] = {32, 16, 8, 4};
  return kBits[static_cast<int>(type)];
}

constexpr int GroupsOf(int depth) { return depth / kGroup + (depth % kGroup != 0); }

constexpr int64_t StripsOf(const Weight& weight) {
  const int64_t outputs = weight.layout == WeightLayout::kOutputRows ? weight.rows : weight.cols;
  return (outputs + kStripOutputs - 1) / kStripOutputs;
}
constexpr int64_t StripBytes(const Weight& weight) {
  return weight.groups * BlockBytes(BitsOf(weight.type));
}

// Packs values[k][output] for k < depth, 0 < depth <= kGroup. False if the block cannot hold them.
bool PackBlock(const KernelTable& kernels, int bits, const float (*values)[kStripOutputs],
               int depth, uint8_t* block);

// Lays an output's groups into a strip of 4 bits, bit for bit. False if a scale or minimum is not
// finite.
bool PackGroups(std::span<const FourBitGroup> groups, int lane, uint8_t* strip);

// Inputs of a strip of `groups` groups, in the order listed, as a strip of their own: floats as
// they are, integers in 8 bits (KernelTable::gather_integers).
void GatherInputs(const KernelTable& kernels, int bits, const uint8_t* strip, int groups,
                  std::span<const int32_t> inputs, float* steps, uint8_t* to);

// The first `depth` values of one output of a strip.
void UnpackOutput(int bits, const uint8_t* strip, int lane, int depth, float* out);

}  // namespace espalier
