// Scenarios: a dense side of 40 pages for rungs 0 and 1, panels of 50 for rungs 2 and 3, and 10
// more that rung 3 alone needs.
#include "engine/weight_keeper.h"

#include <bit>

#include "gtest/gtest.h"

namespace espalier {
namespace {

constexpr RungSet kDense = 0b0011, kNarrow = 0b1100, kAll = 0b1111;
constexpr int kWhole = 200;  // pages

int Releasable(RungSet served) {
  return ((served & kDense) == 0 ? 40 : 0) + ((served & kNarrow) == 0 ? 50 : 0) +
         ((served & 0b1000) == 0 ? 10 : 0);
}

class WeightKeeperTest : public ::testing::Test {
 protected:
  RungSet Decide(double at_s, const RungUse& use, int pages) {
    const RungSet rungs = keeper_.Decide(At(at_s), use, pages, kWhole);
    if (rungs != keeper_.present()) keeper_.Done(rungs, At(at_s), return_s_);
    return rungs;
  }
  static Instant At(double seconds) {
    return std::chrono::duration_cast<Instant>(std::chrono::duration<double>(seconds));
  }

  double return_s_ = 0.01;
  WeightKeeper keeper_{{.dwell_s = 1, .returns_per_dwell = 20, .room = 0.05}, 4, Releasable};
};

TEST_F(WeightKeeperTest, AllStayWhileTheirPagesFit) {
  EXPECT_EQ(Decide(0, {.running = 1, .wished = 1, .pages_used = 100, .pages_needed = 100}, 100),
            kAll);
  EXPECT_EQ(
      Decide(
          1,
          {.running = 1, .wished = 1, .pages_used = 200, .pages_of_head = 50, .pages_needed = 250},
          kWhole),
      kAll)
      << "the pool is full, but nothing was taken away";
}

TEST_F(WeightKeeperTest, WhatNobodyNeedsLeavesFirst) {
  EXPECT_EQ(Decide(0, {.running = 1, .wished = 1, .pages_used = 100, .pages_needed = 100}, 90),
            kDense)
      << "rung 1 needs no more than rung 0";
}

TEST_F(WeightKeeperTest, WhoIsNextCountsToo) {
  const RungUse use{
      .running = 4, .wished = 4, .pages_used = 80, .pages_of_head = 30, .pages_needed = 110};
  EXPECT_EQ(Decide(0, use, 100), 0b0100u);
}

TEST_F(WeightKeeperTest, NothingLeavesThatSomebodyWishesFor) {
  const RungUse use{.running = 1, .wished = 8, .pages_used = 100, .pages_needed = 100};
  EXPECT_EQ(Decide(0, use, 90), kAll);
}

TEST_F(WeightKeeperTest, AllComeBackAfterADwellOfRoomAndNotBefore) {
  const RungUse use{.running = 1, .wished = 1, .pages_used = 100, .pages_needed = 100};
  EXPECT_EQ(Decide(0, use, 90), kDense);
  EXPECT_EQ(Decide(1, use, 104), kDense) << "a twentieth more must be there";
  EXPECT_EQ(keeper_.next(), kNever);
  EXPECT_EQ(Decide(2, use, 105), kDense);
  EXPECT_EQ(keeper_.next(), At(3));
  EXPECT_EQ(Decide(2.5, use, 90), kDense);
  EXPECT_EQ(Decide(2.6, use, 105), kDense);
  EXPECT_EQ(Decide(3.5, use, 105), kDense) << "the wait began anew";
  EXPECT_EQ(Decide(3.7, use, 105), kAll);
}

TEST_F(WeightKeeperTest, ASlowReturnIsWaitedForLonger) {
  const RungUse dense{.running = 1, .wished = 1, .pages_used = 100, .pages_needed = 100};
  return_s_ = 0.2;  // of which twenty are 4 s
  EXPECT_EQ(Decide(0, dense, 90), kDense);
  EXPECT_EQ(Decide(1, dense, kWhole), kDense);
  EXPECT_EQ(Decide(2.1, dense, kWhole), kAll) << "none was seen so far";
  EXPECT_EQ(Decide(3, dense, 90), kDense);
  EXPECT_EQ(Decide(4, dense, kWhole), kDense);
  EXPECT_EQ(Decide(7.9, dense, kWhole), kDense);
  EXPECT_EQ(Decide(8.1, dense, kWhole), kAll);
}

TEST_F(WeightKeeperTest, WhatIsWishedForComesBackAtOnceWhereThereIsRoom) {
  RungUse use{.running = 1, .wished = 1, .pages_used = 100, .pages_needed = 100};
  EXPECT_EQ(Decide(0, use, 90), kDense);
  use = {.running = 1, .wished = 0b101, .pages_used = 80, .pages_needed = 80};
  EXPECT_EQ(Decide(0.1, use, 80), 0b0111u) << "84 pages beside all but rung 3's own ten";
}

TEST_F(WeightKeeperTest, OrInExchangeForWhatNobodyWishesForADwellLater) {
  RungUse use{.running = 1, .wished = 1, .pages_used = 100, .pages_needed = 100};
  EXPECT_EQ(Decide(0, use, 60), kDense);
  use.wished = 4;  // all of them
  EXPECT_EQ(Decide(0.5, use, 60), kDense);
  EXPECT_EQ(Decide(1.5, use, 60), 0b0100u);
  use = {.running = 4, .wished = 1, .pages_used = 110, .pages_needed = 110};
  EXPECT_EQ(Decide(3, use, 60), kDense) << "beside the dense side 60 + 60 pages fit";
}

TEST_F(WeightKeeperTest, WhoMayHaveNothingElseWaitsForRoomAndThenGetsIt) {
  RungUse use{.running = 8, .wished = 8, .pages_used = 90, .pages_needed = 90};
  EXPECT_EQ(Decide(0, use, 55), 0b1100u);
  use.wished |= 1;  // the next one, at rung 0 or not at all
  use.pages_of_head = use.pages_needed = 20;
  EXPECT_EQ(Decide(5, use, 55), 0b1100u);
  use = {.wished = 1, .head = 1, .pages_of_head = 20, .pages_needed = 20};
  EXPECT_EQ(Decide(6, use, -30), kDense) << "nobody runs any more: whatever it takes";
}

TEST_F(WeightKeeperTest, WhoMayHaveSomethingElseGetsThatUntilADwellLater) {
  EXPECT_EQ(Decide(0, {}, -1), kDense);
  const RungUse use{.wished = 4, .head = kAll, .pages_of_head = 20, .pages_needed = 20};
  EXPECT_EQ(Decide(0.5, use, -1), kDense);
  EXPECT_EQ(Decide(1.5, use, -1), 0b0100u);
}

TEST_F(WeightKeeperTest, NobodyNeedsPanelsWhereNobodyIs) {
  EXPECT_EQ(Decide(0, {}, 0), kAll);
  EXPECT_EQ(Decide(1, {}, -1), kDense) << "weights alone are too much";
  EXPECT_EQ(Decide(3, {}, -1), kDense);
  EXPECT_EQ(Decide(4, {}, 0), kDense);
  EXPECT_EQ(Decide(5, {}, 0), kAll);
}

TEST_F(WeightKeeperTest, TheLeastIsWhatRuns) {
  EXPECT_EQ(keeper_.Least({.running = 1, .wished = 8}), kDense);
  EXPECT_EQ(keeper_.Least({.running = 4, .wished = 1}), 0b0100u);
  EXPECT_EQ(keeper_.Least({}), kAll);
}

}  // namespace
}  // namespace espalier
