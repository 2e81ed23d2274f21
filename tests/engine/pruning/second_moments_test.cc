#include "engine/pruning/second_moments.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

TEST(SecondMoments, AreMeansOfProducts) {
  constexpr int kChannels = 230, kStride = 233;  // more than a step of the triangle, and a tail
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  SecondMoments moments(3, kChannels, backend.get());
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<double> want(kChannels * kChannels), first(kChannels);
  int rows = 0;
  for (const int some : {5, 0, 33, 1}) {
    std::vector<float> hidden(kStride * some + 1);
    for (float& value : hidden) value = normal(random);
    ASSERT_TRUE(moments.Add(1, ConstMatrix(hidden.data(), some, kChannels, kStride)).ok());
    for (int r = 0; r < some; ++r) {
      const float* row = hidden.data() + r * kStride;
      for (int i = 0; i < kChannels; ++i) {
        first[i] += row[i];
        for (int j = 0; j < kChannels; ++j) want[i * kChannels + j] += double{row[i]} * row[j];
      }
    }
    rows += some;
  }
  EXPECT_EQ(moments.tokens(1), rows);
  EXPECT_EQ(moments.tokens(0), 0);
  const std::vector<float> got = moments.Mean(1);
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i] / rows, 1e-5) << i;
  for (int i = 0; i < kChannels; ++i) {
    ASSERT_EQ(moments.Energy(1)[i], got[i * (kChannels + 1)]);
    ASSERT_NEAR(moments.FirstMoment(1)[i], first[i] / rows, 1e-5);
  }
  for (const float value : moments.Mean(2)) ASSERT_EQ(value, 0);
  for (const float value : moments.Energy(2)) ASSERT_EQ(value, 0);
}

}  // namespace
}  // namespace espalier
