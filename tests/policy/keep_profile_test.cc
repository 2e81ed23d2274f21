#include "policy/keep_profile.h"

#include "gtest/gtest.h"

namespace espalier {
namespace {

constexpr SiteWidths kWidths{.layers = 2, .heads = 4, .channels = 12};

TEST(KeepProfile, DenseKeepsEverything) {
  const KeepProfile profile = KeepProfile::Dense(kWidths);
  EXPECT_TRUE(profile.dense());
  EXPECT_EQ(profile.kept(1, SiteKind::kHeads), 4);
  EXPECT_EQ(profile.kept(0, SiteKind::kChannels), 12);
  EXPECT_EQ(profile.prune_ratio(), 0);
}

TEST(KeepProfile, KeepNarrowsOneSiteWithinItsWidth) {
  KeepProfile profile = KeepProfile::Dense(kWidths);
  profile.Keep(1, SiteKind::kChannels, 3);
  profile.Keep(0, SiteKind::kHeads, -2);
  profile.Keep(1, SiteKind::kHeads, 99);
  EXPECT_EQ(profile.kept(1, SiteKind::kChannels), 3);
  EXPECT_EQ(profile.kept(0, SiteKind::kHeads), 0);
  EXPECT_EQ(profile.kept(1, SiteKind::kHeads), 4);
  EXPECT_EQ(profile.kept(0, SiteKind::kChannels), 12);
  EXPECT_FALSE(profile.dense());
  EXPECT_DOUBLE_EQ(profile.prune_ratio(), (9.0 + 4.0) / 32.0);
}

TEST(KeepProfile, TellsNarrowedSitesFromDroppedBlocks) {
  KeepProfile profile = KeepProfile::Dense(kWidths);
  EXPECT_FALSE(profile.narrows() || profile.drops());
  profile.Keep(0, SiteKind::kHeads, 0);
  EXPECT_TRUE(profile.drops());
  EXPECT_FALSE(profile.narrows());
  profile.Keep(1, SiteKind::kChannels, 3);
  EXPECT_TRUE(profile.drops() && profile.narrows());
  profile.Keep(0, SiteKind::kHeads, 3);
  EXPECT_TRUE(profile.narrows());
  EXPECT_FALSE(profile.drops());
}

TEST(KeepProfile, AProfileThatIsWidenedAgainIsDense) {
  KeepProfile profile = KeepProfile::Dense(kWidths);
  profile.Keep(0, SiteKind::kHeads, 1);
  profile.Keep(0, SiteKind::kHeads, 4);
  EXPECT_TRUE(profile.dense());
}

TEST(KeepProfile, EverythingDroppedIsRatioOne) {
  KeepProfile profile = KeepProfile::Dense(kWidths);
  for (int layer = 0; layer < 2; ++layer) {
    profile.Keep(layer, SiteKind::kHeads, 0);
    profile.Keep(layer, SiteKind::kChannels, 0);
  }
  EXPECT_DOUBLE_EQ(profile.prune_ratio(), 1);
}

TEST(KeepProfile, NestingIsSiteBySite) {
  const KeepProfile dense = KeepProfile::Dense(kWidths);
  KeepProfile heads = dense;
  heads.Keep(0, SiteKind::kHeads, 2);
  KeepProfile channels = dense;
  channels.Keep(1, SiteKind::kChannels, 2);
  EXPECT_TRUE(dense.NestedIn(dense));
  EXPECT_TRUE(heads.NestedIn(dense));
  EXPECT_FALSE(dense.NestedIn(heads));
  EXPECT_FALSE(heads.NestedIn(channels));
  EXPECT_FALSE(channels.NestedIn(heads));
  EXPECT_FALSE(KeepProfile::Dense({.layers = 1, .heads = 4, .channels = 12}).NestedIn(dense));
}

}  // namespace
}  // namespace espalier
