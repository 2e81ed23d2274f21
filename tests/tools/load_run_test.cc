#include "tools/load_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace espalier {
namespace {

TEST(PoissonArrivals, HaveTheRateAskedFor) {
  const std::vector<double> arrivals = PoissonArrivals(50, 0, 20000, 1);
  ASSERT_EQ(arrivals.size(), 20000u);
  EXPECT_TRUE(std::is_sorted(arrivals.begin(), arrivals.end()));
  EXPECT_NEAR(20000 / arrivals.back(), 50, 1.5);  // 4 standard deviations
}

TEST(PoissonArrivals, AreAsIrregularAsAPoissonProcess) {
  const std::vector<double> arrivals = PoissonArrivals(50, 0, 20000, 1);
  double mean = 0, square = 0, last = 0;
  for (const double at : arrivals) {
    mean += at - last;
    square += (at - last) * (at - last);
    last = at;
  }
  mean /= 20000;
  EXPECT_NEAR(square / 20000 / (mean * mean), 2, 0.15);  // second moment of an exponential
}

TEST(PoissonArrivals, EndWithTheDuration) {
  const std::vector<double> arrivals = PoissonArrivals(100, 2, 1 << 30, 3);
  EXPECT_NEAR(static_cast<double>(arrivals.size()), 200, 60);
  EXPECT_LT(arrivals.back(), 2);
}

TEST(PoissonArrivals, SameSeedSameArrivals) {
  EXPECT_EQ(PoissonArrivals(10, 0, 50, 7), PoissonArrivals(10, 0, 50, 7));
  EXPECT_NE(PoissonArrivals(10, 0, 50, 7), PoissonArrivals(10, 0, 50, 8));
}

TEST(MayBeGood, UntilATargetIsMissed) {
  const LoadShape shape{.max_tokens = 101, .ttft_target = 2, .tpot_target = 0.1};
  EXPECT_TRUE(MayBeGood(shape, 2.4, -1));
  EXPECT_FALSE(MayBeGood(shape, 2.6, -1));
  EXPECT_FALSE(MayBeGood(shape, 3, 2.1));
  EXPECT_TRUE(MayBeGood(shape, 12.3, 1.9));
  EXPECT_FALSE(MayBeGood(shape, 12.5, 1.9));
  EXPECT_TRUE(MayBeGood({.max_tokens = 101, .ttft_target = 2}, 1e6, 1.9));
  EXPECT_TRUE(MayBeGood({.max_tokens = 101}, 1e6, -1));
}

}  // namespace
}  // namespace espalier
