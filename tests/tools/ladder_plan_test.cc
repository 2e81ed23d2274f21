#include "tools/ladder_plan.h"

#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "policy/blocks/block_orders.h"
#include "tools/channel_fit.h"

namespace espalier {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

ModelConfig Model(int layers, int channels) {
  ModelConfig config;
  config.layers = layers;
  config.heads = 4;
  config.channels = channels;
  return config;
}

std::vector<int> Channels(const Ladder& ladder, int rung, int layers) {
  std::vector<int> kept;
  for (int layer = 0; layer < layers; ++layer) {
    kept.push_back(ladder.rung(rung).decode.kept(layer, SiteKind::kChannels));
  }
  return kept;
}

std::vector<int> Planned(const LayerWidths& widths, const ModelConfig& config, double ratio) {
  const RungPlan plans[] = {{.ratio = ratio}};
  const absl::StatusOr<Ladder> ladder = PlanLadder(widths, config, plans, {});
  if (!ladder.ok() || ladder->size() != 2) {
    ADD_FAILURE() << ladder.status();
    return {};
  }
  return Channels(*ladder, 1, config.layers);
}

int Sum(const std::vector<int>& counts) { return std::accumulate(counts.begin(), counts.end(), 0); }

TEST(LadderPlan, LeavesAsManyChannelsWhereverTheyLeave) {
  const ModelConfig config = Model(30, 1536);
  const double shares[] = {0.2, 0.4, 0.6};
  for (const double ratio : shares) {
    const std::vector<int> uniform =
        Planned({.dense_layers = 3, .left_out = shares}, config, ratio);
    EXPECT_THAT(std::vector(uniform.begin(), uniform.begin() + 3), Each(1536));
    EXPECT_THAT(std::vector(uniform.begin() + 3, uniform.end()), Each(uniform.back()));
    const std::vector<int> sloped =
        Planned({.dense_layers = 3, .left_out = shares, .last_dense_layers = 1, .slope = 0.3},
                config, ratio);
    EXPECT_EQ(Sum(sloped), Sum(uniform));
    EXPECT_THAT(std::vector(sloped.begin(), sloped.begin() + 3), Each(1536));
    EXPECT_EQ(sloped.back(), 1536);
    EXPECT_LT(sloped[3], uniform[3]);
    for (int layer = 4; layer < 30; ++layer) EXPECT_GE(sloped[layer], sloped[layer - 1]);
    for (const int kept : sloped) EXPECT_EQ(kept % 64, 0);
  }
}

TEST(LadderPlan, FallsEvenlyWithTheSlope) {
  const double shares[] = {0.5};
  EXPECT_THAT(Planned({.left_out = shares, .slope = 0.5}, Model(5, 16 * 64), 0.5),
              ElementsAre(4 * 64, 6 * 64, 8 * 64, 10 * 64, 12 * 64));
  EXPECT_THAT(Planned({.left_out = shares, .last_dense_layers = 1}, Model(5, 16 * 64), 0.5),
              ElementsAre(6 * 64, 6 * 64, 6 * 64, 6 * 64, 16 * 64));
}

TEST(LadderPlan, FallsLessWhereThatWouldEmptyLayers) {
  const double shares[] = {0.75};
  const std::vector<int> kept =
      Planned({.left_out = shares, .slope = 0.5}, Model(5, 16 * 64), 0.75);
  EXPECT_EQ(Sum(kept), 5 * 4 * 64);
  EXPECT_EQ(kept.front(), 3 * 64);  // 13 of 16 groups, not 18
}

TEST(LadderPlan, TakesFromTheLastLayersWhatWouldEmptyOthers) {
  const double shares[] = {0.75};
  EXPECT_THAT(Planned({.left_out = shares, .last_dense_layers = 1}, Model(2, 4 * 64), 0.75),
              ElementsAre(64, 64));
  const double half[] = {0.5};
  EXPECT_THAT(Planned({.left_out = half, .last_dense_layers = 9}, Model(2, 4 * 64), 0.5),
              ElementsAre(2 * 64, 2 * 64));
  const double most[] = {0.3};
  const LayerWidths widths{
      .dense_layers = 3, .left_out = most, .last_dense_layers = 1, .slope = 0.5};
  const std::vector<int> kept = Planned(widths, Model(5, 1536), 0.3);
  EXPECT_THAT(kept, Each(::testing::Ge(0.15 * 1536 - 64)));
  EXPECT_EQ(Sum(kept), Sum(Planned({.dense_layers = 3, .left_out = most}, Model(5, 1536), 0.3)));
}

TEST(LadderPlan, LeavesOutAsAskedWhateverTheWidth) {
  const double shares[] = {0.5};
  const LayerWidths sloped{.left_out = shares, .last_dense_layers = 1, .slope = 0.5};
  // Groups are of 32, three in a layer, of which uniformly one leaves.
  EXPECT_THAT(Planned(sloped, Model(4, 96), 0.5), ElementsAre(32, 64, 64, 96));
  EXPECT_THAT(Planned(sloped, Model(1, 1024), 0.5), ElementsAre(512));
  const RungPlan plans[] = {{.ratio = 0.5}};
  EXPECT_EQ(PlanLadder(sloped, Model(4, 64), plans, {}).status().message(),
            "--rungs: none of them narrows this model");
  // What the first three do not leave out is more than the others have.
  const double all[] = {0.95};
  const std::vector<int> none =
      Planned({.dense_layers = 3, .left_out = all, .last_dense_layers = 1, .slope = 0.5},
              Model(30, 1536), 0.95);
  EXPECT_THAT(std::vector(none.begin() + 3, none.end()), Each(0));
}

TEST(LadderPlan, KeepsNoMoreAnywhereOnAHarderRung) {
  const ModelConfig config = Model(30, 1536);
  const double shares[] = {0.2, 0.21, 0.22, 0.4, 0.43};
  std::vector<RungPlan> plans;
  for (const double ratio : {0.05, 0.1, 0.2, 0.21, 0.22, 0.3, 0.38, 0.4, 0.43, 0.5}) {
    plans.push_back({.ratio = ratio});
  }
  const absl::StatusOr<Ladder> ladder =
      PlanLadder({.dense_layers = 3, .left_out = shares, .last_dense_layers = 1, .slope = 0.9},
                 config, plans, {});
  ASSERT_TRUE(ladder.ok()) << ladder.status();
  EXPECT_GE(ladder->size(), 8);
  for (int rung = 1; rung < ladder->size(); ++rung) {
    const std::vector<int> milder = Channels(*ladder, rung - 1, 30);
    const std::vector<int> harder = Channels(*ladder, rung, 30);
    for (int layer = 0; layer < 30; ++layer) EXPECT_LE(harder[layer], milder[layer]);
  }
}

TEST(LadderPlan, NestsWhereSharesGiveWay) {
  // At 0.69 of five layers the last one no longer stays whole, and others would keep more for it.
  const ModelConfig config = Model(5, 16 * 64);
  const double alone[] = {0.69}, both[] = {0.68, 0.69};
  EXPECT_THAT(Planned({.left_out = alone, .last_dense_layers = 1, .slope = 0.5}, config, 0.69),
              ElementsAre(192, 256, 320, 384, 448));
  const RungPlan plans[] = {{.ratio = 0.68}, {.ratio = 0.69}};
  const absl::StatusOr<Ladder> ladder =
      PlanLadder({.left_out = both, .last_dense_layers = 1, .slope = 0.5}, config, plans, {});
  ASSERT_TRUE(ladder.ok()) << ladder.status();
  ASSERT_EQ(ladder->size(), 3);
  EXPECT_THAT(Channels(*ladder, 1, 5), ElementsAre(192, 192, 256, 256, 1024));
  EXPECT_THAT(Channels(*ladder, 2, 5), ElementsAre(192, 192, 256, 256, 448));
}

TEST(LadderPlan, HasARungForEachAskedForThatDiffers) {
  const double shares[] = {0.2, 0.2, 0.4};
  const LayerWidths widths{
      .dense_layers = 1, .left_out = shares, .last_dense_layers = 1, .slope = 0.5};
  const RungPlan plans[] = {{.ratio = 0.2},
                            {.ratio = 0.2},
                            {.ratio = 0.4, .heads = 0.3},
                            {.ratio = 0.4, .heads = 0.3, .blocks = 1},
                            {.ratio = 0.4, .heads = 0.3, .blocks = 1, .int4_kv = true}};
  const int drop_order[] = {AttentionBlock(2)};
  const absl::StatusOr<Ladder> ladder = PlanLadder(widths, Model(5, 1536), plans, drop_order);
  ASSERT_TRUE(ladder.ok()) << ladder.status();
  ASSERT_EQ(ladder->size(), 5);
  const auto heads = [&](int rung, int layer) {
    return ladder->rung(rung).decode.kept(layer, SiteKind::kHeads);
  };
  EXPECT_EQ(heads(2, 0), 4);
  EXPECT_EQ(heads(2, 4), 3) << "only the MLPs of last layers stay whole";
  EXPECT_EQ(Channels(*ladder, 2, 5).back(), 1536);
  EXPECT_EQ(heads(2, 2), 3);
  EXPECT_EQ(heads(3, 2), 0);
  EXPECT_EQ(Channels(*ladder, 3, 5), Channels(*ladder, 2, 5));
  EXPECT_FALSE(ladder->rung(3).int4_kv);
  EXPECT_TRUE(ladder->rung(4).int4_kv);
  // Without widths a ratio is its own.
  const RungPlan one[] = {{.ratio = 0.3}};
  EXPECT_TRUE(PlanLadder({.dense_layers = 1}, Model(5, 1536), one, {}).ok());
}

TEST(LadderPlan, FitsAsManyRungsAsThereAreWidths) {
  const double shares[] = {0.2, 0.4, 0.6};
  const std::vector<int> drop_order = {AttentionBlock(9), AttentionBlock(7), AttentionBlock(8)};
  for (const double slope : {0.0, 0.3, 0.5, 0.9}) {
    std::vector<RungPlan> plans;
    for (const double ratio : {0.1, 0.2, 0.3, 0.4, 0.5, 0.6}) {
      plans.push_back({.ratio = ratio, .blocks = ratio > 0.4 ? 3 : 0});
    }
    plans.insert(plans.begin() + 4, {.ratio = 0.4, .blocks = 3});
    const absl::StatusOr<Ladder> ladder =
        PlanLadder({.dense_layers = 3, .left_out = shares, .last_dense_layers = 1, .slope = slope},
                   Model(30, 1536), plans, drop_order);
    ASSERT_TRUE(ladder.ok()) << ladder.status();
    ASSERT_EQ(ladder->size(), 8);
    std::set<int> fitted;
    for (const std::map<int, int>& counts : KeptCounts(*ladder)) {
      for (const auto& [kept, rung] : counts) fitted.insert(rung);
    }
    EXPECT_THAT(fitted, ElementsAre(2, 4, 7)) << slope;
  }
}

TEST(LadderPlan, MixesTwoWidthsHarderInFirstLayersAndTheMildestInLast) {
  const double shares[] = {0.25, 0.5};
  const ModelConfig config = Model(4, 8 * 64);
  const LayerWidths widths{.left_out = shares};
  EXPECT_THAT(Planned(widths, config, 0.25), Each(6 * 64));
  EXPECT_THAT(Planned(widths, config, 0.375), ElementsAreArray({4 * 64, 4 * 64, 6 * 64, 6 * 64}));
  EXPECT_THAT(Planned(widths, config, 0.125), ElementsAreArray({8 * 64, 8 * 64, 6 * 64, 6 * 64}));
  EXPECT_THAT(Planned(widths, config, 0.5), Each(4 * 64));
  EXPECT_THAT(Planned(widths, config, 0.75), Each(2 * 64));
}

}  // namespace
}  // namespace espalier
