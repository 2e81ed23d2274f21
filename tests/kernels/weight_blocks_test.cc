#include "kernels/cpu/weight_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/isa.h"
#include "tests/kernels/kernel_cases.h"

namespace espalier {
namespace {

// One output's values, packed and unpacked; the other lanes hold something else.
std::vector<float> RoundTrip(int bits, const std::vector<float>& values) {
  constexpr int kLane = 5;
  const int depth = static_cast<int>(values.size());
  float block_values[kGroup][kStripOutputs];
  std::fill_n(block_values[0], kGroup * kStripOutputs, 0.25f);
  for (int k = 0; k < depth; ++k) block_values[k][kLane] = values[k];
  alignas(64) uint8_t block[BlockBytes(32)];
  EXPECT_TRUE(PackBlock(PortableKernels(), bits, block_values, depth, block));
  std::vector<float> out(depth);
  UnpackOutput(bits, block, kLane, depth, out.data());
  return out;
}

double WorstError(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max<double>(worst, std::fabs(a[i] - b[i]));
  return worst;
}

double SquaredError(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
  return sum;
}

double Range(const std::vector<float>& v) {
  const auto [least, most] = std::minmax_element(v.begin(), v.end());
  return double{*most} - *least;
}

std::vector<float> Normal(int count, uint32_t seed, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

TEST(WeightBlocks, KeepWhatA4BitFileHolds) {
  std::mt19937 random(1);
  for (int turn = 0; turn < 200; ++turn) {
    const float scale = static_cast<float>(64 + random() % 1984) / 65536;
    const float minimum = -static_cast<float>(random() % 2048) / 4096;
    std::vector<float> values(kGroup);
    for (float& v : values) v = scale * static_cast<float>(random() % 16) + minimum;
    values[3] = minimum;
    values[17] = scale * 15 + minimum;
    EXPECT_LE(WorstError(RoundTrip(4, values), values), 1e-6 * Range(values)) << turn;
    EXPECT_LE(WorstError(RoundTrip(8, values), values), 1e-6 * Range(values)) << turn;
  }
}

// Whatever it holds: unused ends, a negative or subnormal scale, a constant.
TEST(WeightBlocks, GroupsOfASourceAreKeptBitForBit) {
  std::mt19937 random(5);
  constexpr int kGroups = 40, kLane = 11;
  std::vector<FourBitGroup> groups(kGroups);
  for (FourBitGroup& group : groups) {
    group.scale = random() % 4 == 0 ? random() % 64 : 0x2400 + random() % 64;
    if (random() % 3 == 0) group.scale |= 0x8000;
    group.minimum = 0xa800 + random() % 256;
    for (uint8_t& u : group.u) u = random() % 2 == 0 ? 0x77 : random();
  }
  alignas(64) uint8_t strip[kGroups * BlockBytes(4)] = {};
  EXPECT_TRUE(PackGroups(groups, kLane, strip));
  std::vector<float> out(kGroups * kGroup);
  UnpackOutput(4, strip, kLane, kGroups * kGroup, out.data());
  const auto wide = [](uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(1024.0f + fraction, exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
  };
  for (int k = 0; k < kGroups * kGroup; ++k) {
    const FourBitGroup& group = groups[k / kGroup];
    const int i = k % kGroup, u = i < 16 ? group.u[i] & 15 : group.u[i - 16] >> 4;
    EXPECT_EQ(out[k], wide(group.scale) * static_cast<float>(u) + wide(group.minimum)) << k;
  }
  groups[7].minimum = 0x7c01;
  EXPECT_FALSE(PackGroups(groups, kLane, strip));
  groups[7].minimum = 0;
  groups[8].scale = 0xfc00;
  EXPECT_FALSE(PackGroups(groups, kLane, strip));
}

// By no more than half of a 240th of an output's range, and the fp16 rounding of such a step; also
// where groups count down. Every instruction set gives the same bits.
TEST(WeightBlocks, InputsAreGatheredFromAnyGroups) {
  std::mt19937 random(6);
  constexpr int kGroups = 5, kInputs = kGroups * kGroup;
  alignas(64) uint8_t strip[kGroups * BlockBytes(4)] = {};
  for (int lane = 0; lane < kStripOutputs; ++lane) {
    std::vector<FourBitGroup> groups(kGroups);
    for (FourBitGroup& group : groups) {
      group.scale = (random() % 3 == 0 ? 0x8000 : 0) + 0x2000 + random() % 0x400;
      group.minimum = 0xa800 + random() % 256;
      for (uint8_t& u : group.u) u = random();
    }
    ASSERT_TRUE(PackGroups(groups, lane, strip));
  }
  std::vector<int32_t> inputs(70);
  for (int32_t& input : inputs) input = static_cast<int32_t>(random() % kInputs);
  std::vector<float> steps(2 * kGroups * kStripOutputs);
  constexpr size_t kBytes = 3 * BlockBytes(8);
  alignas(64) uint8_t first[kBytes], same[kBytes];
  GatherInputs(PortableKernels(), 4, strip, kGroups, inputs, steps.data(), first);
  for (int lane = 0; lane < kStripOutputs; ++lane) {
    std::vector<float> all(kInputs), got(inputs.size());
    UnpackOutput(4, strip, lane, kInputs, all.data());
    UnpackOutput(8, first, lane, static_cast<int>(inputs.size()), got.data());
    for (size_t i = 0; i < inputs.size(); ++i) {
      EXPECT_NEAR(got[i], all[inputs[i]], 1.1 * Range(all) / 380) << lane << ' ' << i;
    }
  }
  for (const Isa isa : SupportedIsas()) {
    GatherInputs(KernelsOf(isa), 4, strip, kGroups, inputs, steps.data(), same);
    EXPECT_EQ(std::memcmp(first, same, kBytes), 0) << IsaName(isa);
  }
}

// As in Q4_0: multiples of a scale around zero, whose ends are not all in use.
TEST(WeightBlocks, FindTheStepsOfASourceThatDoesNotUseItsEnds) {
  std::mt19937 random(2);
  for (int turn = 0; turn < 200; ++turn) {
    const float scale = static_cast<float>(1024 + random() % 1024) / 65536;
    const float sign = turn % 2 == 0 ? 1.0f : -1.0f;
    std::vector<float> values(kGroup);
    for (float& v : values) v = sign * scale * (static_cast<float>(random() % 13) - 8);
    EXPECT_LE(WorstError(RoundTrip(4, values), values), scale / 100) << turn;
  }
}

TEST(WeightBlocks, StayWithinAStepAtEverySizeAndDepth) {
  for (const float scale : {1e4f, 1.0f, 1e-2f, 1e-4f, 1e-6f}) {
    for (int depth = 1; depth <= kGroup; ++depth) {
      const std::vector<float> values = Normal(depth, depth, scale);
      for (const int bits : {8, 4}) {
        // Half a step, what fp16 rounds of the minimum, and the smallest scale that fp16 has. The
        // fit of 4 bits may give up the ends for the rest.
        const double step = Range(values) / (bits == 8 ? 240 : 15);
        const double bound = (bits == 8 ? 0.6 : 2.5) * step + 2e-3 * scale + 6e-8;
        EXPECT_LE(WorstError(RoundTrip(bits, values), values), bound)
            << fmt::format("{} bits, {} values of {}", bits, depth, scale);
      }
    }
  }
}

TEST(WeightBlocks, FitFourBitsBetterThanEvenStepsBetweenTheEnds) {
  double fitted = 0, even = 0;
  for (uint32_t seed = 1; seed <= 100; ++seed) {
    const std::vector<float> values = Normal(kGroup, seed, 1);
    const float least = *std::min_element(values.begin(), values.end());
    const auto step = static_cast<float>(Range(values) / 15);
    std::vector<float> plain;
    for (float v : values) plain.push_back(least + step * std::nearbyint((v - least) / step));
    fitted += SquaredError(RoundTrip(4, values), values);
    even += SquaredError(plain, values);
  }
  EXPECT_LT(fitted, 0.9 * even);
}

TEST(WeightBlocks, SixteenBitsAreTheUpperHalfToNearestEven) {
  // 1 + n / 256: bf16 has every second of them.
  const std::vector<float> values = {
      1,    1 + 1 / 256.0f, 1 + 2 / 256.0f, 1 + 3 / 256.0f, -1.00390637f,
      0.0f, 1e-37f,         3.38e38f,       -1e-30f};
  const std::vector<float> out = RoundTrip(16, values);
  EXPECT_EQ(out[0], 1);
  EXPECT_EQ(out[1], 1) << "a tie goes to the even one";
  EXPECT_EQ(out[2], 1 + 2 / 256.0f);
  EXPECT_EQ(out[3], 1 + 4 / 256.0f);
  EXPECT_EQ(out[4], -1 - 2 / 256.0f) << "just above the tie";
  EXPECT_EQ(out[5], 0);
  for (int i = 6; i < 9; ++i) EXPECT_NEAR(out[i] / values[i], 1, 1 / 256.0) << values[i];
  for (int depth = 1; depth <= kGroup; ++depth) {  // and all that bf16 holds is kept
    const std::vector<float> once = RoundTrip(16, Normal(depth, depth, 1));
    EXPECT_EQ(RoundTrip(16, once), once);
  }
  float block[kGroup][kStripOutputs] = {};
  block[7][2] = -3.4e38f;  // finite, but nearer to 2^128 than to what bf16 has
  alignas(64) uint8_t packed[BlockBytes(32)];
  EXPECT_FALSE(PackBlock(PortableKernels(), 16, block, kGroup, packed));
}

TEST(WeightBlocks, ConstantsAndLimits) {
  for (const int bits : {8, 4}) {
    EXPECT_EQ(RoundTrip(bits, std::vector<float>(kGroup, 0.0f)), std::vector<float>(kGroup, 0.0f));
    EXPECT_EQ(RoundTrip(bits, std::vector<float>(7, -1.5f)), std::vector<float>(7, -1.5f));
    EXPECT_EQ(RoundTrip(bits, {-65504.0f}), std::vector<float>{-65504.0f});
    float values[kGroup][kStripOutputs];
    std::fill_n(values[0], kGroup * kStripOutputs, 1.0f);
    alignas(64) uint8_t block[BlockBytes(32)];
    for (const float large : {1e5f, -1e5f, 3e38f, -3e38f}) {
      values[3][9] = large;
      // A large maximum alone fits as long as its steps do.
      const bool fits = large == 1e5f;
      EXPECT_EQ(PackBlock(PortableKernels(), bits, values, kGroup, block), fits) << large;
    }
  }
}

}  // namespace
}  // namespace espalier
