#include "policy/ladder.h"

#include "gtest/gtest.h"

namespace espalier {
namespace {

constexpr SiteWidths kWidths{.layers = 2, .heads = 4, .channels = 12};

TEST(Ladder, RungZeroIsDenseAndLosesNothing) {
  const Ladder ladder = Ladder::DenseOnly(kWidths);
  ASSERT_EQ(ladder.size(), 1);
  EXPECT_TRUE(ladder.rung(0).prefill.dense());
  EXPECT_TRUE(ladder.rung(0).decode.dense());
  EXPECT_EQ(ladder.rung(0).price.quality_loss_nats, 0);
}

TEST(PriceTag, IsDominatedByOneThatIsLowerInSomeAndHigherInNone) {
  const PriceTag price{2, 3, 100, 0.1};
  EXPECT_FALSE(Dominated(price, price));
  EXPECT_FALSE(Dominated(price, {1, 4, 50, 0})) << "slower in decode";
  for (const PriceTag better :
       {PriceTag{1, 3, 100, 0.1}, {2, 2, 100, 0.1}, {2, 3, 99, 0.1}, {2, 3, 100, 0}}) {
    EXPECT_TRUE(Dominated(price, better));
    EXPECT_FALSE(Dominated(better, price));
  }
}

TEST(Ladder, TakesOnlyNestedRungs) {
  Ladder ladder = Ladder::DenseOnly(kWidths);
  Rung rung = ladder.rung(0);
  rung.decode.Keep(0, SiteKind::kChannels, 6);
  ASSERT_TRUE(ladder.Append(rung));  // prefill milder than decode

  Rung sideways = ladder.rung(0);
  sideways.decode.Keep(1, SiteKind::kChannels, 3);  // but wider in layer 0
  EXPECT_FALSE(ladder.Append(sideways));
  EXPECT_EQ(ladder.size(), 2);

  rung.prefill.Keep(0, SiteKind::kHeads, 1);
  EXPECT_TRUE(ladder.Append(rung));
  EXPECT_TRUE(ladder.Append(rung));  // nested in itself
  EXPECT_EQ(ladder.size(), 4);

  Rung milder = rung;
  milder.prefill.Keep(0, SiteKind::kHeads, 2);
  EXPECT_FALSE(ladder.Append(milder));
}

TEST(Ladder, HardestWithinALoss) {
  Ladder ladder = Ladder::DenseOnly(kWidths);
  Rung rung = ladder.rung(0);
  for (const double loss : {0.1, 0.3, 0.2}) {
    rung.price.quality_loss_nats = loss;
    ASSERT_TRUE(ladder.Append(rung));
  }
  EXPECT_EQ(ladder.HardestWithin(-1), 0);
  EXPECT_EQ(ladder.HardestWithin(0.1), 1);
  EXPECT_EQ(ladder.HardestWithin(0.25), 1) << "rung 2 on the way loses more";
  EXPECT_EQ(ladder.HardestWithin(0.3), 3);
}

TEST(Ladder, ALayerHoldsKvWhileEitherPhaseKeepsAHead) {
  Rung rung = Ladder::DenseOnly(kWidths).rung(0);
  rung.decode.Keep(1, SiteKind::kHeads, 0);
  EXPECT_TRUE(rung.HoldsKv(1));
  rung.prefill.Keep(1, SiteKind::kHeads, 0);
  EXPECT_FALSE(rung.HoldsKv(1));
  EXPECT_TRUE(rung.HoldsKv(0));
}

}  // namespace
}  // namespace espalier
