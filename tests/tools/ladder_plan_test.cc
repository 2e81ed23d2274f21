#include "tools/ladder_plan.h"

#include <numeric>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

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
  EXPECT_EQ(kept.front(), 2 * 64);  // 14 of 16 groups, not 18
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

TEST(LadderPlan, KeepsNoMoreAnywhereOnAHarderRung) {
  const ModelConfig config = Model(30, 1536);
  const double shares[] = {0.2, 0.21, 0.22, 0.4, 0.43};
  std::vector<RungPlan> plans;
  for (const double ratio : {0.05, 0.1, 0.2, 0.21, 0.22, 0.3, 0.4, 0.43, 0.5}) {
    plans.push_back({.ratio = ratio});
  }
  const absl::StatusOr<Ladder> ladder =
      PlanLadder({.dense_layers = 3, .left_out = shares, .last_dense_layers = 1, .slope = 0.9},
                 config, plans, {});
  ASSERT_TRUE(ladder.ok()) << ladder.status();
  for (int rung = 1; rung < ladder->size(); ++rung) {
    const std::vector<int> milder = Channels(*ladder, rung - 1, 30);
    const std::vector<int> harder = Channels(*ladder, rung, 30);
    for (int layer = 0; layer < 30; ++layer) EXPECT_LE(harder[layer], milder[layer]);
  }
}

TEST(LadderPlan, MixesTwoWidthsHarderInFirstLayers) {
  const double shares[] = {0.25, 0.5};
  const ModelConfig config = Model(4, 8 * 64);
  const LayerWidths widths{.left_out = shares};
  EXPECT_THAT(Planned(widths, config, 0.25), Each(6 * 64));
  EXPECT_THAT(Planned(widths, config, 0.375), ElementsAreArray({4 * 64, 4 * 64, 6 * 64, 6 * 64}));
  EXPECT_THAT(Planned(widths, config, 0.125), ElementsAreArray({6 * 64, 6 * 64, 8 * 64, 8 * 64}));
  EXPECT_THAT(Planned(widths, config, 0.5), Each(4 * 64));
  EXPECT_THAT(Planned(widths, config, 0.75), Each(2 * 64));
}

}  // namespace
}  // namespace espalier
