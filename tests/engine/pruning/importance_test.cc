#include "engine/pruning/importance.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::FloatEq;

// down [2, 3], energies and means of three channels.
constexpr float kDown[] = {1, -2, 0, 3, 1, 2};
constexpr float kEnergy[] = {4, 1, 9};
constexpr float kMean[] = {1, -1, 0};

std::vector<float> ScoresBy(Importance importance) {
  return Scores(importance, kEnergy, kMean, DownNorms(importance, kDown, 3));
}

TEST(Importance, IsWhatThePapersSay) {
  // |F_c W_c^2|_2 over outputs, spelled out.
  EXPECT_THAT(ScoresBy(Importance::kPpsp), ElementsAre(FloatEq(std::sqrt(4.0f * 4 + 36 * 36)),
                                                       FloatEq(std::sqrt(16.0f + 1)), FloatEq(36)));
  EXPECT_THAT(ScoresBy(Importance::kWandaSp), ElementsAre(FloatEq(8), FloatEq(3), FloatEq(6)));
  EXPECT_THAT(ScoresBy(Importance::kFlap), ElementsAre(FloatEq(30), FloatEq(0), FloatEq(36)));
  EXPECT_THAT(ScoresBy(Importance::kMagnitude),
              ElementsAre(FloatEq(std::sqrt(10.0f)), FloatEq(std::sqrt(5.0f)), FloatEq(2)));
}

TEST(Importance, RanksAndLetsTheLowerOfTwoAlikeGoFirst) {
  const float scores[] = {1, 5, 1, 7, 5};
  EXPECT_THAT(RankByScore(scores), ElementsAre(3, 4, 1, 2, 0));
}

}  // namespace
}  // namespace espalier
