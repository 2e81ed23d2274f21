#include "engine/model/files/quant_blocks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "tests/support/test_data.h"

namespace espalier {
namespace {

std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<uint32_t> Bits(const float* values, size_t count) {
  std::vector<uint32_t> bits(count);
  std::memcpy(bits.data(), values, count * sizeof(float));
  return bits;
}

class QuantBlocks : public testing::TestWithParam<BlockType> {};

// `folder` has TYPE.raw.bin and TYPE.f32.bin.
void ExpectBitEqual(BlockType type, const std::filesystem::path& folder) {
  const std::string name(BlockTypeName(type));
  const std::string raw = ReadAll(folder / (name + ".raw.bin"));
  const std::string expected_bytes = ReadAll(folder / (name + ".f32.bin"));
  ASSERT_FALSE(raw.empty()) << folder;
  const size_t count = expected_bytes.size() / sizeof(float);
  ASSERT_EQ(raw.size() / BlockBytes(type) * BlockValues(type), count);
  std::vector<float> values(count);
  // From an odd address: blocks in a file are not aligned.
  const std::string shifted = " " + raw;
  Dequantize(type, reinterpret_cast<const std::byte*>(shifted.data() + 1), count, values.data());
  std::vector<float> expected(count);
  std::memcpy(expected.data(), expected_bytes.data(), expected_bytes.size());
  EXPECT_EQ(Bits(values.data(), count), Bits(expected.data(), count));
}

TEST_P(QuantBlocks, EqualNumpyBitForBit) {
  ExpectBitEqual(GetParam(), ESPALIER_SOURCE_DIR "/tests/golden/data/quant_blocks");
}

// Blocks that ggml itself dequantised.
TEST_P(QuantBlocks, EqualGoldenBitForBit) {
  ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
  ExpectBitEqual(GetParam(), std::filesystem::path(golden) / "quant_blocks");
}

TEST(F32, IsCopied) {
  const std::vector<float> values = {1.5f, -0.0f, std::numeric_limits<float>::denorm_min()};
  std::vector<float> copy(values.size());
  Dequantize(BlockType::kF32, reinterpret_cast<const std::byte*>(values.data()), 3, copy.data());
  EXPECT_EQ(Bits(copy.data(), 3), Bits(values.data(), 3));
}

INSTANTIATE_TEST_SUITE_P(All, QuantBlocks,
                         testing::Values(BlockType::kF16, BlockType::kBF16, BlockType::kQ8_0,
                                         BlockType::kQ4_0, BlockType::kQ4_1, BlockType::kQ5_0,
                                         BlockType::kQ5_1, BlockType::kQ4_K, BlockType::kQ5_K,
                                         BlockType::kQ6_K),
                         [](const auto& info) { return std::string(BlockTypeName(info.param)); });

TEST(Half, EveryValueIsSignFractionAndExponent) {
  for (uint32_t half = 0; half <= 0xFFFF; ++half) {
    const int exponent = half >> 10 & 31, fraction = half & 0x3FF;
    const float value = HalfToFloat(static_cast<uint16_t>(half));
    EXPECT_EQ(std::signbit(value), half >> 15 == 1) << half;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(value), fraction != 0) << half;
      EXPECT_EQ(std::isinf(value), fraction == 0) << half;
    } else {
      const int significand = exponent == 0 ? fraction : 1024 + fraction;
      EXPECT_EQ(std::fabs(value), std::ldexp(significand, std::max(exponent, 1) - 25)) << half;
    }
  }
}

TEST(Half, IsWhatItsBitsSay) {
  EXPECT_EQ(HalfToFloat(0x3C00), 1.0f);
  EXPECT_EQ(HalfToFloat(0xC000), -2.0f);
  EXPECT_EQ(HalfToFloat(0x0001), 0x1p-24f);
  EXPECT_EQ(HalfToFloat(0x03FF), 1023 * 0x1p-24f);
  EXPECT_EQ(HalfToFloat(0x0400), 0x1p-14f);
  EXPECT_EQ(HalfToFloat(0x7BFF), 65504.0f);
  EXPECT_EQ(HalfToFloat(0xFC00), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::signbit(HalfToFloat(0x8000)));
}

}  // namespace
}  // namespace espalier
