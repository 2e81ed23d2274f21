#include "policy/kept_counts.h"

#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// Worked out from the published code, with its three dense layers and multiples of 64.
TEST(KeptCounts, AreThePublishedOnes) {
  struct Model {
    int layers, heads, channels;
    std::vector<double> ratios;
    std::vector<int> heads_pruned, channels_kept;
  };
  const Model models[] = {
      {32, 32, 11008, {.22, .44, .66}, {7, 14, 21}, {8640, 6208, 3776}},
      {40, 40, 13824, {.22, .43, .65}, {8, 17, 26}, {10816, 7936, 4864}},
      {32, 32, 14336, {.22, .44, .66}, {7, 14, 21}, {11200, 8064, 4928}},
      {40, 40, 20480, {.22, .43, .65}, {8, 17, 26}, {16000, 11712, 7168}},
      {22, 32, 5632, {.23, .46, .69}, {7, 14, 22}, {4352, 3072, 1792}},
      {30, 9, 1536, {.22, .44, .67}, {1, 3, 6}, {1216, 896, 512}},
  };
  for (const Model& model : models) {
    for (int i = 0; i < 3; ++i) {
      const double ratio = NarrowedLayerRatio(model.layers, 3, 0.2 * (i + 1));
      EXPECT_DOUBLE_EQ(ratio, model.ratios[i]) << model.layers << " layers";
      EXPECT_EQ(model.heads - KeptHeads(model.heads, ratio), model.heads_pruned[i]);
      EXPECT_EQ(KeptChannels(model.channels, ratio, 64), model.channels_kept[i]);
    }
  }
}

TEST(KeptCounts, NeverExceedTheWidth) {
  // The published code keeps 28 of 100 here: its count of the pruned turns negative.
  EXPECT_EQ(KeptChannels(100, 0.1, 64), 100);
  EXPECT_EQ(KeptChannels(1536, 0, 64), 1536);
  EXPECT_EQ(KeptChannels(1536, 1, 64), 0);
  EXPECT_EQ(KeptHeads(9, 1), 0);
  EXPECT_EQ(NarrowedLayerRatio(4, 3, 0.5), 1);
  EXPECT_EQ(NarrowedLayerRatio(30, 0, 0.4), 0.4);
}

}  // namespace
}  // namespace espalier
