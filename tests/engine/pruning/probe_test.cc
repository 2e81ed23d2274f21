#include "engine/pruning/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using Rows = ProbeOptions::Rows;
constexpr SiteKind kChannels = SiteKind::kChannels;
constexpr SiteKind kHeads = SiteKind::kHeads;

// Sequences of the lengths given, end to end.
std::vector<ProbeRow> RowsOf(const std::vector<int>& lengths) {
  std::vector<ProbeRow> rows;
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (int p = 0; p < lengths[s]; ++p) rows.push_back({static_cast<int>(s), p});
  }
  return rows;
}

TEST(ProbeRows, AreTokensFirstThenSequences) {
  const std::vector<ProbeRow> rows = RowsOf({4, 4});
  //                     sequence 0: 1 9 2 3    sequence 1: 2 1 8 2
  const float norms[] = {1, 9, 2, 3, 2, 1, 8, 2};
  // Summed squares of positions: 5, 82, 68, 13. Two of four are a tiny probe, which has position 0
  // in place of its first: {0, 2}, of which sequence 0 holds 5 and sequence 1 68.
  EXPECT_THAT(ChooseProbeRows({.token_share = 0.5, .sequence_share = 0.05}, norms, rows),
              ElementsAre(4, 6));
  EXPECT_THAT(ChooseProbeRows({.token_share = 0.5, .sequence_share = 1}, norms, rows),
              ElementsAre(0, 2, 4, 6));
}

TEST(ProbeRows, LeavePositionZeroOutOfAWideProbe) {
  const std::vector<ProbeRow> rows = RowsOf({24});
  std::vector<float> norms(24, 1);
  for (int p = 12; p < 24; ++p) norms[p] = 2;
  const std::vector<int> chosen = ChooseProbeRows({}, norms, rows);
  ASSERT_EQ(chosen.size(), 12);
  EXPECT_EQ(chosen.front(), 12);
}

TEST(ProbeRows, OfRaggedSequencesNeedNoPadding) {
  const std::vector<ProbeRow> rows = RowsOf({1, 5, 2});
  const std::vector<float> norms(8, 1);
  for (const Rows by : {Rows::kTopNorm, Rows::kSpread, Rows::kAll}) {
    const std::vector<int> chosen =
        ChooseProbeRows({.rows = by, .token_share = 0.4, .sequence_share = 1}, norms, rows);
    EXPECT_TRUE(std::ranges::is_sorted(chosen));
    EXPECT_EQ(std::ranges::adjacent_find(chosen), chosen.end());
    EXPECT_EQ(chosen.size(), by == Rows::kTopNorm ? 5 : 8);  // positions 0 and 1: 3 + 2 rows
  }
  EXPECT_TRUE(ChooseProbeRows({}, {}, {}).empty());
}

TEST(ProbeRows, OverBudgetAreSpreadOverThoseChosen) {
  const std::vector<ProbeRow> rows = RowsOf({40});
  std::vector<float> norms(40, 1);
  for (int p = 20; p < 40; ++p) norms[p] = 2;
  EXPECT_THAT(ChooseProbeRows({.budget = 0.1}, norms, rows), ElementsAre(22, 27, 32, 37));
  EXPECT_THAT(ChooseProbeRows({.rows = Rows::kSpread, .budget = 0.1}, {}, rows),
              ElementsAre(5, 15, 25, 35));
  EXPECT_EQ(ChooseProbeRows({.rows = Rows::kAll, .budget = 0.05}, {}, rows).size(), 40);
  EXPECT_EQ(ChooseProbeRows({.budget = 0}, norms, rows).size(), 1) << "one at least";
}

constexpr int kCounts[] = {1, 2};  // a full ranking of three

TEST(Probe, LooksAheadInPrefillAndBackInDecode) {
  Probe probe({.least_rows = 8, .refresh = 2, .whole = 3}, ProbeSites{History(1, 2), {{1, 1}}});
  EXPECT_EQ(probe.Next(8, 3), Look::kAhead);
  EXPECT_EQ(probe.Next(7, 3), Look::kNone) << "too few rows to pay";
  EXPECT_EQ(probe.Next(0, 3), Look::kNone);
  EXPECT_EQ(probe.Next(0, 3), Look::kBack);
  EXPECT_EQ(probe.Next(0, 3), Look::kWhole);
  EXPECT_EQ(probe.Next(0, 1), Look::kBack);
  EXPECT_EQ(probe.Next(0, 1), Look::kNone);
  EXPECT_EQ(probe.Next(0, 1), Look::kWhole) << "the sixth is both";
  EXPECT_EQ(probe.Next(0, 1), Look::kBack) << "at what the sixth has shown";
  EXPECT_EQ(probe.counts().age, 9) << "nothing was ranked";
  Probe both({.refresh = 2, .whole = 2}, ProbeSites{History(1, 2), {{1, 1}}});
  for (const Look look : {Look::kNone, Look::kWhole, Look::kBack, Look::kWhole, Look::kBack}) {
    EXPECT_EQ(both.Next(0, 1), look);
  }
  Probe frozen({.keep = 1, .whole = 1}, ProbeSites{History(1, 2), {{1, 1}}});
  EXPECT_EQ(frozen.Next(0, 1), Look::kNone) << "nothing would learn";
}

TEST(Probe, RanksByHistoryWhereItsRowsAre) {
  History history(1, 3);
  const float near[] = {3, 1, 2}, far[] = {1, 3, 2};
  const int positions[] = {1, 300};
  history.Learn(0, ConstMatrix(near, 1, 3), {positions, 1});
  history.Learn(0, ConstMatrix(far, 1, 3), {positions + 1, 1});
  Probe probe({}, ProbeSites{history, {{1, 1, 1}}});
  const ProbeRow rows[] = {{0, 2}, {1, 400}, {2, 500}};
  EXPECT_THAT(probe.RankByHistory(0, kChannels, {rows, 1}, kCounts), ElementsAre(0, 2, 1));
  EXPECT_THAT(probe.RankByHistory(0, kChannels, rows, kCounts), ElementsAre(1, 2, 0))
      << "11, 19 and 12";
  EXPECT_EQ(probe.counts().rankings, 2);
  EXPECT_EQ(probe.counts().rows, 0);
  EXPECT_EQ(probe.counts().age, 0);
}

TEST(Probe, RanksNothingOfWhichNothingIsKnown) {
  for (const Rows rows : {Rows::kSpread, Rows::kPrompts}) {
    Probe probe({.rows = rows, .refresh = 1}, ProbeSites{History(1, 3), {{1, 1, 1}}},
                ProbeSites{History(1, 6), {{1, 1, 1, 1, 1, 1}}}, 2);
    const ProbeRow row[] = {{0, 5}};
    const float held[] = {3, 1, 2};
    const int32_t all[] = {0, 1, 2};
    probe.Update(0, kChannels, ConstMatrix(held, 1, 3), row, all);
    EXPECT_THAT(probe.RankByHistory(0, kChannels, row, kCounts), ElementsAre(0, 2, 1));
    EXPECT_THAT(probe.RankByHistory(0, kHeads, row, kCounts), testing::IsEmpty());
    probe.Update(0, kHeads, ConstMatrix(held, 1, 2), row, std::span(all).subspan(1, 1));
    EXPECT_THAT(probe.RankByHistory(0, kHeads, row, kCounts), testing::IsEmpty()) << "one of two";
    EXPECT_EQ(probe.counts().rankings, 1);
  }
}

TEST(Probe, RanksByThePromptsLastRead) {
  Probe probe({.rows = Rows::kPrompts}, ProbeSites{History(1, 3), {{1, 1, 2}}});
  const float held[] = {9, 9, 9, 3, 1, 1, 1, 3, 1};
  const ProbeRow rows[] = {{0, 0}, {0, 1}, {0, 2}};
  const int32_t channels[] = {0, 1, 2};
  const auto read = [&](std::initializer_list<int> of) {
    EXPECT_EQ(probe.Next(0, 1, static_cast<int>(of.size())), Look::kNone);
    for (const int r : of) {
      probe.Update(0, kChannels, ConstMatrix(held + 3 * r, 1, 3), {rows + r, 1}, channels);
    }
  };
  const auto ranking = [&] { return probe.RankByHistory(0, kChannels, {rows, 1}, kCounts); };
  EXPECT_EQ(probe.Next(0, 1, 0), Look::kNone) << "no prompt was read";
  read({0, 1});
  read({1});  // another step, the same prompts
  EXPECT_EQ(probe.Next(0, 1, 0), Look::kBack);
  EXPECT_THAT(ranking(), ElementsAre(0, 2, 1)) << "18, 2 and 2 * 2, without position 0";
  EXPECT_EQ(probe.Next(0, 1, 0), Look::kNone) << "once";
  read({2});
  EXPECT_EQ(probe.Next(0, 1, 0), Look::kBack);
  EXPECT_THAT(ranking(), ElementsAre(1, 2, 0)) << "those before count no more";
}

TEST(FusedEnergy, WeighsTheLargerOfProbeAndHistoryMore) {
  History history(1, 2, 4);
  const float past[] = {2, 0};  // energies 4 and 0
  const int at[] = {1};
  history.Learn(0, ConstMatrix(past, 1, 2), at);
  const float hidden[] = {1, 3, 3, 1};  // two sequences at position 1: energies 5 and 5
  const ProbeRow rows[] = {{0, 1}, {1, 1}};
  const std::vector<float> fused = FusedEnergy({}, history, 0, ConstMatrix(hidden, 2, 2), rows);
  EXPECT_THAT(fused, ElementsAre(FloatNear((25 + 16) / 9.0f, 1e-5f), FloatNear(5, 1e-5f)));
  const std::vector<float> alone =
      FusedEnergy({.fuse = false}, history, 0, ConstMatrix(hidden, 2, 2), rows);
  EXPECT_THAT(alone, ElementsAre(5, 5));
}

TEST(FusedEnergy, OfABucketCountsItsPositions) {
  const History history(1, 1);
  const float hidden[] = {1, 2, 3};  // position 0, then 1 and 2, which share a bucket
  const ProbeRow rows[] = {{0, 0}, {0, 1}, {0, 2}};
  EXPECT_THAT(FusedEnergy({.fuse = false}, history, 0, ConstMatrix(hidden, 3, 1), rows),
              ElementsAre(testing::FloatEq(1 + 4 + 9)));
}

TEST(Probe, RanksByEnergyTimesNorm) {
  Probe probe({.fuse = false}, ProbeSites{History(1, 3), {{1, 10, 1}}});
  const float hidden[] = {3, 1, 2};
  const ProbeRow rows[] = {{0, 5}};
  EXPECT_THAT(probe.Rank(0, kChannels, ConstMatrix(hidden, 1, 3), rows, kCounts),
              ElementsAre(1, 0, 2));
}

TEST(Probe, RanksWholeGroups) {
  Probe probe({.fuse = false, .group = 4},
              ProbeSites{History(1, 8), {std::vector<float>(8, 1.0f)}});
  const float hidden[] = {4, 0, 0, 0, 3, 3, 3, 3};  // 16 and 36 together
  const ProbeRow rows[] = {{0, 5}};
  constexpr int kHalf[] = {4};
  EXPECT_THAT(probe.Rank(0, kChannels, ConstMatrix(hidden, 1, 8), rows, kHalf),
              ElementsAre(4, 5, 6, 7, 0, 1, 2, 3));
}

TEST(Probe, RanksHeadsByTheirColumnsTogether) {
  // Three heads of two columns; history is of what heads kept before.
  Probe probe({.keep = 0.5}, ProbeSites{History(1, 1), {{1}}},
              ProbeSites{History(1, 6), {{1, 1, 1, 1, 4, 1}}}, 2);
  const float hidden[] = {3, 0, 2, 2, 0, 2};  // energies 9, 8 and 4
  const ProbeRow rows[] = {{0, 5}};
  EXPECT_THAT(probe.Rank(0, kHeads, ConstMatrix(hidden, 1, 6), rows, kCounts),
              ElementsAre(0, 1, 2));
  const float norm[] = {3, 0, 2, 2, 2, 0};  // that of the last: four times as much
  EXPECT_THAT(probe.Rank(0, kHeads, ConstMatrix(norm, 1, 6), rows, kCounts), ElementsAre(2, 0, 1));
  const float kept[] = {1, 1, 3, 3};
  const int32_t heads[] = {2, 1};
  probe.Update(0, kHeads, ConstMatrix(kept, 1, 4), rows, heads);
  EXPECT_THAT(probe.history(kHeads).Energy(0, probe.history(kHeads).BucketOf(5)),
              ElementsAre(0, 0, 9, 9, 1, 1));
  EXPECT_THAT(probe.RankByHistory(0, kHeads, rows, kCounts), ElementsAre(1, 2, 0));
  EXPECT_THAT(probe.history(kChannels).Energies(0), testing::Each(0));
}

}  // namespace
}  // namespace espalier
