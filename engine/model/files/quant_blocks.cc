#include "engine/model/files/quant_blocks.h"

#include <array>
#include <bit>
#include <cstring>

namespace espalier {
namespace {

struct Format {
  std::string_view name;
  int values;
  size_t bytes;
};

// Indexed by BlockType.
constexpr std::array<Format, 11> kFormats = {{
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"Q8_0", 32, 2 + 32},
    {"Q4_0", 32, 2 + 16},
    {"Q4_1", 32, 2 + 2 + 16},
    {"Q5_0", 32, 2 + 4 + 16},
    {"Q5_1", 32, 2 + 2 + 4 + 16},
    {"Q4_K", 256, 2 + 2 + 12 + 128},
    {"Q5_K", 256, 2 + 2 + 12 + 32 + 128},
    {"Q6_K", 256, 128 + 64 + 16 + 2},
}};

const Format& FormatOf(BlockType type) { return kFormats[static_cast<size_t>(type)]; }

// Blocks lie at any address: safetensors aligns nothing.
uint32_t Load32(const uint8_t* src) {
  uint32_t bits;
  std::memcpy(&bits, src, sizeof(bits));
  return bits;
}

uint16_t Load16(const uint8_t* src) {
  uint16_t bits;
  std::memcpy(&bits, src, sizeof(bits));
  return bits;
}

float LoadHalf(const uint8_t* src) { return HalfToFloat(Load16(src)); }

float LoadBrainFloat(const uint8_t* src) {
  return std::bit_cast<float>(static_cast<uint32_t>(Load16(src)) << 16);
}

// d, then 32 int8: d * q.
void DequantizeQ8_0(const uint8_t* block, float* dst) {
  const float d = LoadHalf(block);
  for (int i = 0; i < 32; ++i) dst[i] = static_cast<int8_t>(block[2 + i]) * d;
}

// d, then 16 bytes: low nibbles are values 0..15, high ones 16..31. d * (q - 8).
void DequantizeQ4_0(const uint8_t* block, float* dst) {
  const float d = LoadHalf(block);
  const uint8_t* nibbles = block + 2;
  for (int i = 0; i < 16; ++i) {
    dst[i] = ((nibbles[i] & 15) - 8) * d;
    dst[i + 16] = ((nibbles[i] >> 4) - 8) * d;
  }
}

// d, m, then nibbles as Q4_0: d * q + m.
void DequantizeQ4_1(const uint8_t* block, float* dst) {
  const float d = LoadHalf(block);
  const float m = LoadHalf(block + 2);
  const uint8_t* nibbles = block + 4;
  for (int i = 0; i < 16; ++i) {
    dst[i] = (nibbles[i] & 15) * d + m;
    dst[i + 16] = (nibbles[i] >> 4) * d + m;
  }
}

// Bit i of `high` is the fifth bit of value i, whose low four are in nibbles as Q4_0's.
void JoinFiveBits(uint32_t high, const uint8_t* nibbles, int* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = (nibbles[i] & 15) | (high >> i & 1) << 4;
    q[i + 16] = (nibbles[i] >> 4) | (high >> (i + 16) & 1) << 4;
  }
}

// d, the fifth bits, then nibbles: d * (q - 16).
void DequantizeQ5_0(const uint8_t* block, float* dst) {
  const float d = LoadHalf(block);
  int q[32];
  JoinFiveBits(Load32(block + 2), block + 6, q);
  for (int i = 0; i < 32; ++i) dst[i] = (q[i] - 16) * d;
}

// d, m, the fifth bits, then nibbles: d * q + m.
void DequantizeQ5_1(const uint8_t* block, float* dst) {
  const float d = LoadHalf(block);
  const float m = LoadHalf(block + 2);
  int q[32];
  JoinFiveBits(Load32(block + 4), block + 8, q);
  for (int i = 0; i < 32; ++i) dst[i] = q[i] * d + m;
}

// What Q4_K and Q5_K have in common: d, dmin, then 12 bytes with a 6-bit scale and a 6-bit minimum
// for each of 8 runs of 32 values: (d * scale) * q - dmin * minimum. Runs 0..3 have their scale in
// the low 6 bits of bytes 0..3 and their minimum in those of bytes 4..7; runs 4..7 have their low 4
// bits in bytes 8..11 (scale in the low nibble, minimum in the high) and their top 2 in what runs
// 0..3 left of theirs. `q_of(run, i)` is the value as stored.
template <typename QOf>
void DequantizeRuns(const uint8_t* block, float* dst, QOf q_of) {
  const float d = LoadHalf(block);
  const float d_min = LoadHalf(block + 2);
  const uint8_t* packed = block + 4;
  for (int run = 0; run < 8; ++run) {
    int scale;
    int minimum;
    if (run < 4) {
      scale = packed[run] & 63;
      minimum = packed[run + 4] & 63;
    } else {
      scale = (packed[run + 4] & 15) | (packed[run - 4] >> 6 << 4);
      minimum = (packed[run + 4] >> 4) | (packed[run] >> 6 << 4);
    }
    const float step = d * scale;
    const float offset = d_min * minimum;
    for (int i = 0; i < 32; ++i) dst[run * 32 + i] = step * q_of(run, i) - offset;
  }
}

// Runs' scales, then 128 bytes: each 32 hold one run in their low nibbles and the next in their
// high ones.
void DequantizeQ4_K(const uint8_t* block, float* dst) {
  const uint8_t* nibbles = block + 16;
  DequantizeRuns(block, dst,
                 [=](int run, int i) { return nibbles[run / 2 * 32 + i] >> (run % 2 * 4) & 15; });
}

// Runs' scales, then 32 bytes whose bit r is the fifth bit of run r's values, then nibbles as Q4_K.
void DequantizeQ5_K(const uint8_t* block, float* dst) {
  const uint8_t* high = block + 16;
  const uint8_t* nibbles = block + 48;
  DequantizeRuns(block, dst, [=](int run, int i) {
    return (nibbles[run / 2 * 32 + i] >> (run % 2 * 4) & 15) | (high[i] >> run & 1) << 4;
  });
}

// 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales (one for each 16 values), d:
// (d * scale) * (q - 32). In each half of 128 values, quarter k (32 values) takes the low nibbles
// of the half's bytes 0..31 (k = 0), 32..63 (k = 1) or their high ones (k = 2, 3), and bit pair k
// of the half's 32 upper bytes.
void DequantizeQ6_K(const uint8_t* block, float* dst) {
  const float d = LoadHalf(block + 208);
  for (int quarter = 0; quarter < 8; ++quarter) {
    const int half = quarter / 4;
    const int k = quarter % 4;
    const uint8_t* low = block + half * 64 + k % 2 * 32;
    const uint8_t* high = block + 128 + half * 32;
    const uint8_t* scales = block + 192 + quarter * 2;
    for (int i = 0; i < 32; ++i) {
      const int q = (low[i] >> (k / 2 * 4) & 15) | (high[i] >> (k * 2) & 3) << 4;
      dst[quarter * 32 + i] = d * static_cast<int8_t>(scales[i / 16]) * (q - 32);
    }
  }
}

template <typename DequantizeBlock>
void EachBlock(const Format& format, const uint8_t* src, int64_t count, float* dst,
               DequantizeBlock dequantize) {
  for (int64_t i = 0; i < count; i += format.values) {
    dequantize(src, dst + i);
    src += format.bytes;
  }
}

// Without branches, for vectors.
uint16_t RoundToHalf(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  // Exponent bias 127 becomes 15; a carry out of the mantissa is the next exponent, or infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFF + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14 a half is a whole number of 2^-24, which is the last place of what 0.5 is added to.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) -
                             std::bit_cast<uint32_t>(0.5f);
  const uint32_t odd = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;  // NaN or infinity
  const uint32_t rounded = magnitude < (113u << 23)   ? subnormal
                           : magnitude >= 0x47800000u ? odd
                                                      : normal;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | rounded);
}

uint16_t RoundToBrainFloat(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

}  // namespace

std::string_view BlockTypeName(BlockType type) { return FormatOf(type).name; }
int BlockValues(BlockType type) { return FormatOf(type).values; }
size_t BlockBytes(BlockType type) { return FormatOf(type).bytes; }

void Dequantize(BlockType type, const std::byte* src, int64_t count, float* dst) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(src);
  const Format& format = FormatOf(type);
  switch (type) {
    case BlockType::kF32:
      std::memcpy(dst, src, count * sizeof(float));
      return;
    case BlockType::kF16:
      for (int64_t i = 0; i < count; ++i) dst[i] = LoadHalf(bytes + 2 * i);
      return;
    case BlockType::kBF16:
      for (int64_t i = 0; i < count; ++i) dst[i] = LoadBrainFloat(bytes + 2 * i);
      return;
    case BlockType::kQ8_0:
      return EachBlock(format, bytes, count, dst, DequantizeQ8_0);
    case BlockType::kQ4_0:
      return EachBlock(format, bytes, count, dst, DequantizeQ4_0);
    case BlockType::kQ4_1:
      return EachBlock(format, bytes, count, dst, DequantizeQ4_1);
    case BlockType::kQ5_0:
      return EachBlock(format, bytes, count, dst, DequantizeQ5_0);
    case BlockType::kQ5_1:
      return EachBlock(format, bytes, count, dst, DequantizeQ5_1);
    case BlockType::kQ4_K:
      return EachBlock(format, bytes, count, dst, DequantizeQ4_K);
    case BlockType::kQ5_K:
      return EachBlock(format, bytes, count, dst, DequantizeQ5_K);
    case BlockType::kQ6_K:
      return EachBlock(format, bytes, count, dst, DequantizeQ6_K);
  }
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  uint32_t bits;
  if (magnitude < 0x0400) {  // subnormal: a whole number of 2^-24
    bits = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  } else if (magnitude < 0x7C00) {
    bits = (magnitude << 13) + (112u << 23);  // exponent bias 15 becomes 127
  } else {
    bits = (magnitude << 13) | 0x7F800000;
  }
  return std::bit_cast<float>(sign | bits);
}

void RoundTo(BlockType type, const float* src, int64_t count, std::byte* dst) {
  if (type == BlockType::kF32) {
    std::memcpy(dst, src, count * sizeof(float));
    return;
  }
  const bool half = type == BlockType::kF16;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = half ? RoundToHalf(src[i]) : RoundToBrainFloat(src[i]);
    std::memcpy(dst + i * sizeof(bits), &bits, sizeof(bits));
  }
}

}  // namespace espalier
