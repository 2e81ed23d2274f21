#include "engine/pruning/importance.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include "kernels/sparse24.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::ElementsAreArray;
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

// Each band is the ranking's, in natural order.
void ExpectBands(const std::vector<float>& scores) {
  const std::vector<int32_t> whole = RankByScore(scores);
  for (const std::vector<int>& counts :
       {std::vector<int>{}, {64}, {32, 96, 160}, {32, 33, 34}, {200}, {1, 199}}) {
    const std::vector<int32_t> bands = RankInBands(scores, counts);
    int begin = 0;
    for (size_t i = 0; i <= counts.size(); ++i) {
      const int end = i < counts.size() ? counts[i] : 200;
      std::vector<int32_t> want(whole.begin() + begin, whole.begin() + end);
      std::ranges::sort(want);
      EXPECT_THAT(std::vector<int32_t>(bands.begin() + begin, bands.begin() + end),
                  ElementsAreArray(want));
      begin = end;
    }
  }
}

TEST(RankInBands, HasTheSetsOfTheRanking) {
  std::mt19937 random(1);
  std::vector<float> scores(200), near(200), of_any_sign(200);
  for (float& score : scores) score = static_cast<float>(random() % 50);  // with ties
  for (float& score : near) score = 1 + 1e-6f * static_cast<float>(random() % 100);
  for (float& score : of_any_sign) {
    score = std::ldexp(static_cast<float>(random() % 100) - 50, static_cast<int>(random() % 40));
  }
  of_any_sign[7] = std::numeric_limits<float>::infinity();
  for (const std::vector<float>* each : {&scores, &near, &of_any_sign}) {
    ExpectBands(*each);
  }
}

// What the README of the folder says of 2:4: of every output of `down`, what the kept channels meet
// is 2:4 still.
TEST(ScoreGroups, KeepWholeGroupsWhateverTheCounts) {
  constexpr int kChannels = 96, kOutputs = 5;
  std::mt19937 random(3);
  std::vector<float> down(kOutputs * kChannels);  // 2:4
  for (size_t group = 0; group < down.size(); group += kSparseGroup) {
    down[group + random() % 2] = 1;
    down[group + 2 + random() % 2] = -1;
  }
  for (const int values : {3, 1000}) {  // with many ties, and with few
    std::vector<float> scores(kChannels);
    for (float& score : scores) score = static_cast<float>(random() % values);
    const std::vector<float> before = scores;
    ScoreGroups(kSparseGroup, scores);
    EXPECT_EQ(scores[5], before[4] + before[5] + before[6] + before[7]);
    const auto splits_none = [&](std::span<const int32_t> kept) {
      for (int output = 0; output < kOutputs; ++output) {
        std::vector<float> met;
        for (const int32_t channel : kept) met.push_back(down[output * kChannels + channel]);
        if (!IsSparse24(met)) return false;
      }
      return true;
    };
    constexpr int kHalves[] = {32, 64};
    for (const int count : kHalves) {
      EXPECT_TRUE(splits_none(std::span<const int32_t>(RankByScore(scores)).first(count)));
      EXPECT_TRUE(splits_none(std::span<const int32_t>(RankInBands(scores, kHalves)).first(count)));
      EXPECT_FALSE(
          splits_none(std::span<const int32_t>(RankInBands(before, kHalves)).first(count)));
    }
    std::vector<float> alone = before;
    ScoreGroups(1, alone);
    EXPECT_EQ(alone, before);
  }
}

}  // namespace
}  // namespace espalier
