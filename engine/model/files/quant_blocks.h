// The block formats that weights lie in on disk, and their exact dequantisation to fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace espalier {

enum class BlockType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K
};

// "F32", "Q4_1" ...
std::string_view BlockTypeName(BlockType type);
// Values in one block (1 for the float types) and its size in bytes.
int BlockValues(BlockType type);
size_t BlockBytes(BlockType type);

// Dequantises `count` values (a multiple of BlockValues), bit-equal to ggml's own.
void Dequantize(BlockType type, const std::byte* src, int64_t count, float* dst);

float HalfToFloat(uint16_t half);

// Rounds `count` values to kF32, kF16 or kBF16, to the nearest, ties to even. Beyond what a half
// holds: infinity.
void RoundTo(BlockType type, const float* src, int64_t count, std::byte* dst);

}  // namespace espalier
