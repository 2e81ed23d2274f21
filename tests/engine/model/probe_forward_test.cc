// The probe in the forward pass: what it ranks is what is kept, in prefill and after it, and rows
// that keep all do not notice.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "engine/model/sampler.h"
#include "gtest/gtest.h"
#include "tests/engine/model/forward_harness.h"

namespace espalier {
namespace {

constexpr int kKept = 64;  // of 96

std::vector<int32_t> RandomIds(int count, uint64_t seed) {
  std::vector<int32_t> ids(count);
  for (int i = 0; i < count; ++i) ids[i] = static_cast<int32_t>(UniformAt(seed, i) * 320);
  return ids;
}

Ladder Narrow(const SiteWidths& widths) {
  Ladder ladder = Ladder::DenseOnly(widths);
  for (const int kept : {kKept, 32}) {
    KeepProfile keep = KeepProfile::Dense(widths);
    for (int layer = 0; layer < widths.layers; ++layer) keep.Keep(layer, SiteKind::kChannels, kept);
    EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  }
  return ladder;
}

class ProbeForwardTest : public ::testing::TestWithParam<WeightPlan> {
 protected:
  ProbeForwardTest()
      : model_(ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama.gguf",
               {.weights = GetParam(), .sequences = 3}),
        widths_(model_.file().config().sites()) {}

  // A prompt and three decode rows of sequence 0 on rung 1, beside a prompt on rung 0; logits of
  // all steps.
  struct Run {
    std::vector<float> narrow, dense;
  };
  Run Serve() {
    const std::vector<int32_t> ids = RandomIds(23, 1), other = RandomIds(9, 2);
    const std::span<const int32_t> all(ids);
    Run run;
    for (int start = 0; start < 23; start = start == 0 ? 20 : start + 1) {
      const ForwardHarness::Chunk mine{.sequence = 0,
                                       .start = start,
                                       .ids = all.subspan(start, start == 0 ? 20 : 1),
                                       .rung = 1,
                                       .decode = start > 0};
      const ForwardHarness::Chunk beside{.sequence = 1, .ids = other};
      const ForwardHarness::Chunk chunks[] = {beside, mine};
      const std::vector<float> logits = model_.Step(chunks);
      const auto border = logits.begin() + 9 * 320;
      run.dense.insert(run.dense.end(), logits.begin(), border);
      run.narrow.insert(run.narrow.end(), border, logits.end());
    }
    return run;
  }

  // Zero for every third channel, which therefore leaves.
  std::vector<std::vector<float>> Norms() const {
    std::vector<float> norms(widths_.channels, 1);
    for (int c = 0; c < widths_.channels; c += 3) norms[c] = 0;
    return std::vector(widths_.layers, norms);
  }
  Probe ThirdsLeave(ProbeOptions options) const {
    return Probe(options, {History(widths_.layers, widths_.channels), Norms()});
  }

  // All channels held as much at all positions.
  History Ones() const {
    History history(widths_.layers, widths_.channels);
    const std::vector<float> ones(history.buckets() * widths_.channels, 1);
    for (int layer = 0; layer < widths_.layers; ++layer) history.Restore(layer, ones);
    return history;
  }

  void RankThirdsLast() {
    std::vector<int32_t> ranking;
    for (int c = 0; c < widths_.channels; ++c) {
      if (c % 3 != 0) ranking.push_back(c);
    }
    for (int c = 0; c < widths_.channels; c += 3) ranking.push_back(c);
    for (int layer = 0; layer < widths_.layers; ++layer) {
      EXPECT_TRUE(model_.selector().SetRanking(layer, SiteKind::kChannels, ranking));
    }
  }

  ForwardHarness model_;
  SiteWidths widths_;
};

TEST_P(ProbeForwardTest, KeepsWhatItRanksFirst) {
  model_.SetLadder(Narrow(widths_));
  const Run natural = Serve();
  Probe probe = ThirdsLeave({.rows = ProbeOptions::Rows::kAll, .fuse = false});
  model_.decoder().set_probe(&probe);
  const Run probed = Serve();
  model_.decoder().set_probe(nullptr);

  RankThirdsLast();
  model_.SetLadder(Narrow(widths_));
  const Run ranked = Serve();
  ASSERT_EQ(probed.narrow.size(), ranked.narrow.size());
  const auto off = [&](const Run& run) {
    double sum = 0;
    for (size_t i = 0; i < ranked.narrow.size(); ++i) {
      sum += std::abs(run.narrow[i] - ranked.narrow[i]);
    }
    return sum / static_cast<double>(ranked.narrow.size());
  };
  // The same channels in another order; integers group them otherwise.
  EXPECT_LT(off(probed), (GetParam() == WeightPlan::kF32 ? 1e-5 : 0.2) * off(natural));
  EXPECT_GT(off(natural), 0.05) << "which channels stay makes no difference";
  EXPECT_EQ(probed.dense, ranked.dense) << "rows that keep all";
}

TEST_P(ProbeForwardTest, RanksByWhatWasThereBeforeAttentionIfToldTo) {
  model_.SetLadder(Narrow(widths_));
  const std::vector<std::vector<float>> ones(widths_.layers,
                                             std::vector<float>(widths_.channels, 1));
  const auto serve = [&](bool stale) {
    Probe probe({.rows = ProbeOptions::Rows::kAll, .fuse = false, .stale = stale, .keep = 1},
                {History(widths_.layers, widths_.channels), ones});
    model_.decoder().set_probe(&probe);
    Run run = Serve();
    model_.decoder().set_probe(nullptr);
    EXPECT_EQ(probe.counts().rankings, widths_.layers);
    return run;
  };
  const Run fresh = serve(false), stale = serve(true);
  EXPECT_NE(fresh.narrow, stale.narrow);
  EXPECT_EQ(fresh.dense, stale.dense);
}

TEST_P(ProbeForwardTest, RanksDecodeStepsByHistory) {
  model_.SetLadder(Narrow(widths_));
  const Run natural = Serve();
  Probe probe({.least_rows = 1000, .keep = 1, .refresh = 1}, {Ones(), Norms()});
  model_.decoder().set_probe(&probe);
  const Run refreshed = Serve();
  model_.decoder().set_probe(nullptr);
  EXPECT_EQ(probe.counts().rankings, 3 * widths_.layers);
  EXPECT_EQ(probe.counts().rows, 0);
  const size_t prompt = 20 * 320;
  EXPECT_TRUE(
      std::equal(natural.narrow.begin(), natural.narrow.begin() + prompt, refreshed.narrow.begin()))
      << "prefill meets the ranking there was";
  EXPECT_NE(natural.narrow, refreshed.narrow);
  EXPECT_EQ(natural.dense, refreshed.dense);
}

TEST_P(ProbeForwardTest, RanksDecodeStepsByPromptsReadWhole) {
  Ladder whole = Ladder::DenseOnly(widths_);
  whole.Append({.prefill = whole.rung(0).prefill, .decode = Narrow(widths_).rung(1).decode});
  model_.SetLadder(whole);
  const Run natural = Serve();
  Probe probe = ThirdsLeave({.rows = ProbeOptions::Rows::kPrompts});
  model_.decoder().set_probe(&probe);
  const Run got = Serve();
  model_.decoder().set_probe(nullptr);
  EXPECT_EQ(probe.counts().rankings, widths_.layers) << "once, of three steps";
  EXPECT_EQ(got.dense, natural.dense);
  const size_t prompt = 20 * 320;
  EXPECT_TRUE(std::equal(got.narrow.begin(), got.narrow.begin() + prompt, natural.narrow.begin()));
  RankThirdsLast();
  model_.SetLadder(whole);
  const Run ranked = Serve();
  double off = 0, of_natural = 0;
  for (size_t i = prompt; i < ranked.narrow.size(); ++i) {
    off += std::abs(got.narrow[i] - ranked.narrow[i]);
    of_natural += std::abs(natural.narrow[i] - ranked.narrow[i]);
  }
  EXPECT_LT(off, (GetParam() == WeightPlan::kF32 ? 1e-5 : 0.2) * of_natural);
}

TEST_P(ProbeForwardTest, KeepsAllChannelsInWholeSteps) {
  Ladder half = Ladder::DenseOnly(widths_);  // decodes whole by itself
  half.Append({.prefill = Narrow(widths_).rung(1).prefill, .decode = half.rung(0).decode});
  model_.SetLadder(half);
  const Run whole = Serve();
  model_.SetLadder(Narrow(widths_));
  Probe probe = ThirdsLeave({.least_rows = 1000, .keep = 0.5, .whole = 1});
  model_.decoder().set_probe(&probe);
  const Run got = Serve();
  model_.decoder().set_probe(nullptr);
  EXPECT_EQ(got.narrow, whole.narrow);
  EXPECT_EQ(got.dense, whole.dense);
  // Position 20 is in the fourth bucket, of which history now knows every channel.
  for (const float energy : probe.history(SiteKind::kChannels).Energy(0, 3)) EXPECT_GT(energy, 0);
}

TEST_P(ProbeForwardTest, UpdatesHistoryOfMixedSteps) {
  model_.SetLadder(Narrow(widths_));
  for (const auto rows : {ProbeOptions::Rows::kTopNorm, ProbeOptions::Rows::kSpread}) {
    Probe probe = ThirdsLeave({.rows = rows, .keep = 0.5});
    model_.decoder().set_probe(&probe);
    for (const float value : Serve().narrow) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST_P(ProbeForwardTest, LeavesPanelsThatEveryRungCanUse) {
  model_.SetLadder(Narrow(widths_));
  Probe probe = ThirdsLeave({});
  const std::vector<int32_t> ids = RandomIds(20, 3);
  const std::span<const int32_t> all(ids);
  const auto step = [&](int sequence, int start, int count, int rung) {
    const ForwardHarness::Chunk chunk{.sequence = sequence,
                                      .start = start,
                                      .ids = all.subspan(start, count),
                                      .rung = rung,
                                      .decode = start > 0};
    for (const float value : model_.Step({&chunk, 1})) ASSERT_TRUE(std::isfinite(value));
  };
  model_.decoder().set_probe(&probe);
  step(0, 0, 19, 1);
  step(1, 0, 19, 2);  // ranks anew, for the narrowest alone
  step(0, 19, 1, 1);
  model_.decoder().set_probe(nullptr);
  // Few dense rows beside pruned ones share gate and up where panels hold all channels.
  Serve();
}

TEST_P(ProbeForwardTest, WidensPanelsThatANarrowerStepRanked) {
  const std::vector<int32_t> ids = RandomIds(21, 4);
  const std::span<const int32_t> all(ids);
  const auto step = [&](int sequence, int start, int count, int rung) {
    const ForwardHarness::Chunk chunk{.sequence = sequence,
                                      .start = start,
                                      .ids = all.subspan(start, count),
                                      .rung = rung,
                                      .decode = start > 0};
    return model_.Step({&chunk, 1});
  };
  // The second decode step ranks; the third is on rung 1 whatever rung that was.
  const auto after = [&](int ranking_rung) {
    model_.SetLadder(Narrow(widths_));
    Probe probe({.least_rows = 1000, .keep = 1, .refresh = 2}, {Ones(), Norms()});
    model_.decoder().set_probe(&probe);
    for (const int sequence : {0, 1}) step(sequence, 0, 19, 0);
    for (const int start : {19, 20}) step(0, start, 1, ranking_rung);
    EXPECT_EQ(probe.counts().rankings, widths_.layers);
    std::vector<float> logits = step(1, 19, 1, 1);
    model_.decoder().set_probe(nullptr);
    EXPECT_EQ(probe.counts().rankings, widths_.layers);
    return logits;
  };
  EXPECT_EQ(after(2), after(1));
}

// Of its four heads the first layer keeps two, on rung 1.
class HeadProbeTest : public ProbeForwardTest {
 protected:
  static constexpr int kKeptHeads = 2;

  Ladder NarrowHeads() const {
    KeepProfile keep = KeepProfile::Dense(widths_);
    keep.Keep(0, SiteKind::kHeads, kKeptHeads);
    Ladder ladder = Ladder::DenseOnly(widths_);
    EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
    return ladder;
  }
  int columns() const { return model_.file().config().columns(SiteKind::kHeads); }
  std::vector<std::vector<float>> Ones() const {
    return std::vector(widths_.layers, std::vector<float>(columns(), 1));
  }
  Probe ProbeOf(const ProbeOptions& options) const {
    return Probe(options, {History(widths_.layers, widths_.channels), Norms()},
                 {History(widths_.layers, columns()), Ones()}, model_.file().config().head_dim);
  }
  // Rung 1's prompt and decode rows with heads ranked so before.
  Run ServeRanked(const std::vector<int32_t>& ranking) {
    EXPECT_TRUE(model_.selector().SetRanking(0, SiteKind::kHeads, ranking));
    model_.SetLadder(NarrowHeads());
    return Serve();
  }
};

// By what they give where their rows are, from all that is before them: as one sees it in the dense
// model, which the first layer's heads are of until one leaves.
TEST_P(HeadProbeTest, KeepsTheHeadsThatItsRowsHoldMostOf) {
  const std::vector<int32_t> ids = RandomIds(23, 1);
  std::vector<double> energy(widths_.heads);
  model_.decoder().set_input_observer([&](int layer, MatrixInput input, ConstMatrix rows) {
    if (layer != 0 || input != MatrixInput::kO) return;
    const int dim = rows.cols / widths_.heads;
    for (int r = 0; r < rows.rows; ++r) {
      for (int c = 0; c < rows.cols; ++c) {
        energy[c / dim] += double{rows.row(r)[c]} * rows.row(r)[c];
      }
    }
  });
  model_.Logits(std::span(ids).first(20));
  model_.decoder().set_input_observer({});
  std::vector<int32_t> ranking(widths_.heads);
  std::iota(ranking.begin(), ranking.end(), 0);
  std::ranges::sort(ranking, [&](int a, int b) { return energy[a] > energy[b]; });
  const auto in_bands = [](std::vector<int32_t> heads) {  // as a panel has them
    std::sort(heads.begin(), heads.begin() + kKeptHeads);
    std::sort(heads.begin() + kKeptHeads, heads.end());
    return heads;
  };
  const std::vector<int32_t> best = in_bands(ranking);
  const std::vector<int32_t> worst = in_bands({ranking.rbegin(), ranking.rend()});
  const Run ranked = ServeRanked(best), wrong = ServeRanked(worst);
  EXPECT_NE(ranked.narrow, wrong.narrow);
  Probe probe = ProbeOf({.rows = ProbeOptions::Rows::kAll, .fuse = false});
  model_.decoder().set_probe(&probe);
  const Run probed = Serve();  // from the worst heads' panels
  model_.decoder().set_probe(nullptr);
  EXPECT_EQ(probed.narrow, ranked.narrow);
  EXPECT_EQ(probed.dense, ranked.dense);
  EXPECT_EQ(probe.counts().rankings, 1);
  EXPECT_EQ(probe.counts().rows, 20);
  // It was told of the heads that stayed, and of no others.
  const std::span<const float> held = probe.history(SiteKind::kHeads).Energy(0, 2);
  for (int head = 0; head < widths_.heads; ++head) {
    const bool stayed = head == best[0] || head == best[1];
    EXPECT_EQ(held[head * columns() / widths_.heads] > 0, stayed) << head;
  }
}

TEST_P(HeadProbeTest, ProbesFewRowsAndLooksBackAndKeepsAllForOnce) {
  model_.SetLadder(NarrowHeads());
  const Run plain = Serve();
  Probe spread = ProbeOf({.rows = ProbeOptions::Rows::kSpread, .budget = 0.1, .refresh = 1});
  model_.decoder().set_probe(&spread);
  const Run looked = Serve();
  EXPECT_EQ(spread.counts().rows, 2) << "of 20";
  EXPECT_EQ(spread.counts().rankings, 4) << "one ahead, three back";
  EXPECT_EQ(looked.dense, plain.dense);
  for (const float value : looked.narrow) ASSERT_TRUE(std::isfinite(value));

  Ladder half = Ladder::DenseOnly(widths_);
  half.Append({.prefill = NarrowHeads().rung(1).prefill, .decode = half.rung(0).decode});
  model_.decoder().set_probe(nullptr);
  model_.SetLadder(half);
  const Run whole = Serve();
  model_.SetLadder(NarrowHeads());
  Probe seldom = ProbeOf({.least_rows = 1000, .whole = 1});
  model_.decoder().set_probe(&seldom);
  EXPECT_EQ(Serve().narrow, whole.narrow);
  model_.decoder().set_probe(nullptr);
}

INSTANTIATE_TEST_SUITE_P(Weights, HeadProbeTest,
                         ::testing::Values(WeightPlan::kF32, WeightPlan::kInt8, WeightPlan::kInt4),
                         [](const auto& info) { return std::string(WeightPlanName(info.param)); });

INSTANTIATE_TEST_SUITE_P(Weights, ProbeForwardTest,
                         ::testing::Values(WeightPlan::kF32, WeightPlan::kInt8, WeightPlan::kInt4),
                         [](const auto& info) { return std::string(WeightPlanName(info.param)); });

}  // namespace
}  // namespace espalier
