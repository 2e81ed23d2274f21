#include "engine/pruning/history.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <random>

namespace espalier {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::FloatEq;

TEST(History, BucketsGrowFourfoldAndLeavePositionZeroAlone) {
  const History history(1, 1);
  const int firsts[] = {0, 1, 4, 16, 64, 256, 1024, 1 << 20};
  for (int bucket = 0; bucket < 7; ++bucket) {
    EXPECT_EQ(history.BucketOf(firsts[bucket]), bucket);
    EXPECT_EQ(history.BucketOf(firsts[bucket + 1] - 1), bucket);
  }
  EXPECT_EQ(history.BucketOf(1 << 20), 6);
  const History exact(1, 1, 10);
  EXPECT_EQ(exact.BucketOf(9), 9);
  EXPECT_EQ(exact.BucketOf(99), 10);
}

TEST(History, LearnsTheMeanOfSquares) {
  History history(2, 2);
  const float hidden[] = {1, 2, 3, 0, 5, -4};
  const int positions[] = {0, 1, 3};
  history.Learn(1, ConstMatrix(hidden, 3, 2), positions);
  EXPECT_THAT(history.Energy(1, 0), ElementsAre(FloatEq(1), FloatEq(4)));
  EXPECT_THAT(history.Energy(1, 1), ElementsAre(FloatEq(17), FloatEq(8)));
  EXPECT_THAT(history.Energy(1, 2), Each(0));
  EXPECT_THAT(history.Energy(0, 0), Each(0));
}

TEST(History, UpdatesTheKeptChannelsOnly) {
  History history(1, 3);
  const float learned[] = {1, 2, 3};
  const int at[] = {2};
  history.Learn(0, ConstMatrix(learned, 1, 3), at);
  const float hidden[] = {10, 0, 20, 1};  // rows of channels 2 and 0
  const int positions[] = {1, 3};
  const int32_t kept[] = {2, 0};
  history.Update(0, ConstMatrix(hidden, 2, 2), positions, kept, 0.9);
  EXPECT_THAT(history.Energy(0, 1), ElementsAre(FloatEq(0.9f * 1 + 0.1f * 0.5f), FloatEq(4),
                                                FloatEq(0.9f * 9 + 0.1f * 250)));
}

TEST(History, WithABucketForEachPositionIsTheExactOne) {
  // Texts of four tokens, of which positions 0 .. 3 are buckets 0, 1, 1, 1; exactly, four. With one
  // position in each bucket, 0, 1, 4 and 16, both are the same.
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int positions[] = {0, 1, 4, 16};
  History exact(1, 5, 17), bucketed(1, 5);
  const int32_t kept[] = {4, 1};
  for (int text = 0; text < 20; ++text) {
    std::vector<float> hidden(20);
    for (float& value : hidden) value = normal(random);
    for (History* history : {&exact, &bucketed}) {
      if (text < 10) {
        history->Learn(0, ConstMatrix(hidden.data(), 4, 5), positions);
      } else {
        history->Update(0, ConstMatrix(hidden.data(), 4, 2, 5), positions, kept, 0.99);
      }
    }
  }
  for (const int position : positions) {
    const auto want = exact.Energy(0, exact.BucketOf(position));
    EXPECT_THAT(bucketed.Energy(0, bucketed.BucketOf(position)),
                testing::ElementsAreArray(want.begin(), want.end()));
  }
}

}  // namespace
}  // namespace espalier
