#include "engine/pruning/second_moments.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

TEST(SecondMoments, AreMeansOfProducts) {
  constexpr int kChannels = 230, kStride = 233;  // more than a step of the triangle, and a tail
  constexpr int kOutputs = 21;
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  SecondMoments moments(kChannels, kOutputs, backend.get());
  for (const float value : moments.Mean()) ASSERT_EQ(value, 0);
  for (const float value : moments.Energy()) ASSERT_EQ(value, 0);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<double> want(kChannels * kChannels), first(kChannels), missed(kOutputs * kChannels);
  int rows = 0;
  for (const int some : {5, 0, 33, 1}) {
    std::vector<float> hidden(kStride * some + 1), beside(kOutputs * some + 1);
    for (float& value : hidden) value = normal(random);
    for (float& value : beside) value = normal(random);
    ASSERT_TRUE(moments
                    .Add(ConstMatrix(hidden.data(), some, kChannels, kStride),
                         ConstMatrix(beside.data(), some, kOutputs))
                    .ok());
    for (int r = 0; r < some; ++r) {
      const float* row = hidden.data() + r * kStride;
      for (int i = 0; i < kChannels; ++i) {
        first[i] += row[i];
        for (int j = 0; j < kChannels; ++j) want[i * kChannels + j] += double{row[i]} * row[j];
        for (int n = 0; n < kOutputs; ++n) {
          missed[n * kChannels + i] += double{beside[r * kOutputs + n]} * row[i];
        }
      }
    }
    rows += some;
  }
  EXPECT_EQ(moments.tokens(), rows);
  const std::vector<float> got = moments.Mean(), got_missed = moments.Missed();
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i] / rows, 1e-5) << i;
  for (size_t i = 0; i < missed.size(); ++i) {
    ASSERT_NEAR(got_missed[i], missed[i] / rows, 1e-5) << i;
  }
  for (int i = 0; i < kChannels; ++i) {
    ASSERT_EQ(moments.Energy()[i], got[i * (kChannels + 1)]);
    ASSERT_NEAR(moments.FirstMoment()[i], first[i] / rows, 1e-5);
  }
}

// Beside rows of energy 25, sinks of as much say nothing; of much more, half of all there is to
// fit.
TEST(SecondMoments, CountSinksThatAreLarge) {
  const auto backend = CreateCpuBackend({.threads = 1}).value();
  SecondMoments moments(2, 1, backend.get());
  const float row[] = {3, 4}, misses[] = {1};
  ASSERT_TRUE(moments.Add(ConstMatrix(row, 1, 2), ConstMatrix(misses, 1, 1)).ok());
  moments.AddSink(std::vector<float>{40, 20}, std::vector<float>{5});
  EXPECT_EQ(moments.Mean(), std::vector<float>({9, 12, 12, 16}));
  moments.AddSink(std::vector<float>{160, 180}, std::vector<float>{15});
  EXPECT_EQ(moments.tokens(), 1);
  // Their mean is 100, 100 and 10, and weighs 25 / 20,000.
  const float sink = 12.5;
  EXPECT_EQ(moments.Mean(), std::vector<float>({9 + sink, 12 + sink, 12 + sink, 16 + sink}));
  EXPECT_EQ(moments.Missed(), std::vector<float>({3 + 1.25, 4 + 1.25}));
  EXPECT_EQ(moments.Energy(), std::vector<float>({9, 16}));
  EXPECT_EQ(moments.FirstMoment(), std::vector<float>({3, 4}));
  EXPECT_EQ(moments.MissedFirst(), std::vector<float>({1}));
}

TEST(SecondMoments, NeedNoOutputs) {
  const auto backend = CreateCpuBackend({.threads = 1}).value();
  SecondMoments moments(2, 0, backend.get());
  const float row[] = {3, 4};
  ASSERT_TRUE(moments.Add(ConstMatrix(row, 1, 2), {}).ok());
  EXPECT_EQ(moments.Mean(), std::vector<float>({9, 12, 12, 16}));
  EXPECT_TRUE(moments.Missed().empty());
}

}  // namespace
}  // namespace espalier
