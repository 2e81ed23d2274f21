#include "policy/policy.h"

#include <cmath>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// Rung i keeps 10 - i of 10 channels in the one layer, no heads are narrowed, and loses i / 100
// nats.
Ladder TestLadder() {
  const SiteWidths widths{.layers = 1, .heads = 10, .channels = 10};
  Ladder ladder = Ladder::DenseOnly(widths);
  for (int i = 1; i < 5; ++i) {
    Rung rung = ladder.rung(i - 1);
    rung.decode.Keep(0, SiteKind::kChannels, 10 - i);
    rung.price.quality_loss_nats = i / 100.0;
    EXPECT_TRUE(ladder.Append(rung));
  }
  return ladder;
}

int Choose(int rung, const PruneBounds& bounds) {
  return FixedPolicy(rung).ChooseRung({.allowed = AllowedRungs(bounds, TestLadder())});
}

TEST(FixedPolicy, ServesItsRungToThoseWhoCanBearIt) { EXPECT_EQ(Choose(3, {}), 3); }

TEST(FixedPolicy, IsHeldToTheLadder) {
  EXPECT_EQ(Choose(99, {}), 4);
  EXPECT_EQ(Choose(-1, {}), 0);
  EXPECT_EQ(HardestIn(~RungSet{0}, 99), 63);
}

TEST(FixedPolicy, GoesNoFurtherThanTheBounds) {
  EXPECT_EQ(Choose(4, {.max_prune_ratio = 0.1}), 2);  // 2 of 20 heads and channels
  EXPECT_EQ(Choose(4, {.max_prune_ratio = 0.15}), 3);
  EXPECT_EQ(Choose(4, {.max_prune_ratio = 0.0999}), 1);
  EXPECT_EQ(Choose(4, {.max_prune_ratio = 0}), 0);
  EXPECT_EQ(Choose(4, {.max_quality_loss = 0.03}), 3);
  EXPECT_EQ(Choose(4, {.max_prune_ratio = 0.15, .max_quality_loss = 0.01}), 1);
  EXPECT_EQ(Choose(1, {.max_prune_ratio = 0.15}), 1);
}

TEST(HardestIn, IsTheRungAskedForOrAMilderOne) {
  EXPECT_EQ(HardestIn(0b11111, 2), 2);
  EXPECT_EQ(HardestIn(0b10011, 3), 1);
  EXPECT_EQ(HardestIn(0b00001, 3), 0);
}

TEST(FixedPolicy, NeverIsNever) { EXPECT_EQ(Choose(4, {.never = true}), 0); }

TEST(Allows, CountsTheHarderOfTheTwoPhases) {
  const Ladder ladder = TestLadder();
  EXPECT_EQ(ladder.rung(4).prefill.prune_ratio(), 0);
  EXPECT_FALSE(Allows({.max_prune_ratio = 0.1}, ladder.rung(4)));
  EXPECT_TRUE(Allows({.max_prune_ratio = 0.2}, ladder.rung(4)));
}

TEST(Allows, FewerBitsAreNotNothing) {
  Rung rung = TestLadder().rung(0);
  EXPECT_TRUE(Allows({.max_prune_ratio = 0, .never = true}, rung));
  rung.int4_kv = true;
  EXPECT_FALSE(Allows({.never = true}, rung));
  EXPECT_FALSE(Allows({.max_prune_ratio = 0}, rung));
  EXPECT_TRUE(Allows({.max_prune_ratio = 0.01}, rung));
  EXPECT_TRUE(Allows({}, rung));
}

TEST(Allows, ALossAsItIsTold) {
  Rung rung = TestLadder().rung(1);
  rung.price.quality_loss_nats = 0.1625;  // more than the float next to it
  EXPECT_TRUE(Allows({.max_quality_loss = 0.1625F}, rung));
  EXPECT_FALSE(Allows({.max_quality_loss = 0.16249F}, rung));
}

TEST(Allows, EveryBoundAllowsRungZero) {
  const Ladder ladder = TestLadder();
  EXPECT_TRUE(Allows({.max_prune_ratio = 0, .max_quality_loss = 0, .never = true}, ladder.rung(0)));
  for (const double bound : {-1.0, std::nan("")}) {
    EXPECT_EQ(Choose(4, {.max_prune_ratio = bound}), 0) << bound;
    EXPECT_EQ(Choose(4, {.max_quality_loss = bound}), 0) << bound;
    EXPECT_TRUE(Allows({.max_prune_ratio = bound, .max_quality_loss = bound}, ladder.rung(0)));
  }
}

}  // namespace
}  // namespace espalier
