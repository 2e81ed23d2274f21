#include "tools/statistics.h"

#include <gtest/gtest.h>

#include <vector>

namespace espalier {
namespace {

TEST(Percentile, InterpolatesBetweenClosestRanks) {
  const std::vector<double> sample = {40, 10, 30, 20};  // numpy.percentile gives the same
  EXPECT_DOUBLE_EQ(Percentile(sample, 0), 10);
  EXPECT_DOUBLE_EQ(Percentile(sample, 50), 25);
  EXPECT_DOUBLE_EQ(Percentile(sample, 90), 37);
  EXPECT_DOUBLE_EQ(Percentile(sample, 99), 39.7);
  EXPECT_DOUBLE_EQ(Percentile(sample, 100), 40);
}

TEST(Percentile, OfOneValueIsThatValue) {
  EXPECT_DOUBLE_EQ(Percentile(std::vector<double>{7}, 99), 7);
}

TEST(Percentile, OfNothingIsZero) { EXPECT_EQ(Percentile({}, 50), 0); }

TEST(Percentile, OutsideTheRangeIsTheNearestEnd) {
  EXPECT_DOUBLE_EQ(Percentile(std::vector<double>{1, 2}, -5), 1);
  EXPECT_DOUBLE_EQ(Percentile(std::vector<double>{1, 2}, 200), 2);
}

TEST(Median, OfAnOddSampleIsItsMiddle) {
  EXPECT_DOUBLE_EQ(Median(std::vector<double>{3, 1, 2}), 2);
}

}  // namespace
}  // namespace espalier
