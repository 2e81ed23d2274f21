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

// Logits of ids [start, end) of a sequence alone in a step; one row decodes.
std::vector<float> StepOf(ForwardHarness* model, std::span<const int32_t> ids, int sequence,
                          int start, int end, int rung) {
  const ForwardHarness::Chunk chunk{.sequence = sequence,
                                    .start = start,
                                    .ids = ids.subspan(start, end - start),
                                    .rung = rung,
                                    .decode = end - start == 1};
  return model->Step({&chunk, 1});
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
  const auto step = [&](int sequence, int start, int end, int rung) {
    for (const float value : StepOf(&model_, ids, sequence, start, end, rung)) {
      ASSERT_TRUE(std::isfinite(value));
    }
  };
  model_.decoder().set_probe(&probe);
  step(0, 0, 19, 1);
  step(1, 0, 19, 2);  // ranks anew, for the narrowest alone
  step(0, 19, 20, 1);
  model_.decoder().set_probe(nullptr);
  // Few dense rows beside pruned ones share gate and up where panels hold all channels.
  Serve();
}

TEST_P(ProbeForwardTest, WidensPanelsThatANarrowerStepRanked) {
  const std::vector<int32_t> ids = RandomIds(21, 4);
  const auto step = [&](int sequence, int start, int end, int rung) {
    return StepOf(&model_, ids, sequence, start, end, rung);
  };
  // The second decode step ranks; the third is on rung 1 whatever rung that was.
  const auto after = [&](int ranking_rung) {
    model_.SetLadder(Narrow(widths_));
    Probe probe({.least_rows = 1000, .keep = 1, .refresh = 2}, {Ones(), Norms()});
    model_.decoder().set_probe(&probe);
    for (const int sequence : {0, 1}) step(sequence, 0, 19, 0);
    for (const int start : {19, 20}) step(0, start, start + 1, ranking_rung);
    EXPECT_EQ(probe.counts().rankings, widths_.layers);
    std::vector<float> logits = step(1, 19, 20, 1);
    model_.decoder().set_probe(nullptr);
    EXPECT_EQ(probe.counts().rankings, widths_.layers);
    return logits;
  };
  EXPECT_EQ(after(2), after(1));
}

struct HeadCase {
  const char* name;
  const char* file;
  WeightPlan weights;
};

// Of its four heads the first layer keeps three on rung 1, and two on rung 2. What it attends to is
// the dense model's, whatever left it before; so its heads hold what they hold there.
class HeadProbeTest : public ::testing::TestWithParam<HeadCase> {
 protected:
  HeadProbeTest()
      : model_(std::string(ESPALIER_SOURCE_DIR "/tests/golden/data/") + GetParam().file,
               {.weights = GetParam().weights, .sequences = 3}),
        config_(model_.file().config()) {}

  enum class Of : uint8_t { kBoth, kPrefill, kDecode };
  Ladder Narrow(Of of = Of::kBoth) const {
    Ladder ladder = Ladder::DenseOnly(config_.sites());
    const KeepProfile dense = ladder.rung(0).prefill;
    for (const int heads : {3, 2}) {
      KeepProfile keep = dense;
      keep.Keep(0, SiteKind::kHeads, heads);
      EXPECT_TRUE(ladder.Append({.prefill = of == Of::kDecode ? dense : keep,
                                 .decode = of == Of::kPrefill ? dense : keep}));
    }
    return ladder;
  }

  std::vector<float> Step(int sequence, int start, int end, int rung, int ids = 1) {
    return StepOf(&model_, RandomIds(40, ids), sequence, start, end, rung);
  }

  // Adds what heads hold in the dense model at the positions.
  void AddEnergies(const std::vector<int>& positions, int ids, std::vector<double>* energies) {
    energies->resize(config_.heads);
    const int dim = config_.head_dim;
    model_.decoder().set_input_observer([&](int layer, MatrixInput input, ConstMatrix rows) {
      if (layer != 0 || input != MatrixInput::kO) return;
      for (const int r : positions) {
        for (int c = 0; c < rows.cols; ++c) {
          (*energies)[c / dim] += double{rows.row(r)[c]} * rows.row(r)[c];
        }
      }
    });
    Step(2, 0, 24, 0, ids);
    model_.decoder().set_input_observer({});
  }

  // Panels of the heads in the order of their energies, within a rung's as they are numbered.
  void RankBy(const std::vector<double>& energies, const Ladder& ladder) {
    std::vector<int32_t> ranking = {0, 1, 2, 3};
    std::ranges::sort(ranking, [&](int a, int b) { return energies[a] > energies[b]; });
    std::sort(ranking.begin(), ranking.begin() + 2);
    EXPECT_TRUE(model_.selector().SetRanking(0, SiteKind::kHeads, ranking));
    model_.SetLadder(ladder);
  }
  void RankBy(const std::vector<int>& positions, const Ladder& ladder) {
    std::vector<double> energies;
    AddEnergies(positions, 1, &energies);
    RankBy(energies, ladder);
  }
  // Panels of the heads that hold least.
  void RankWrongly(const Ladder& ladder) {
    std::vector<double> energies;
    AddEnergies(From(0, 20), 1, &energies);
    for (double& energy : energies) energy = -energy;
    RankBy(energies, ladder);
  }
  static std::vector<int> From(int begin, int end) {
    std::vector<int> all(end - begin);
    std::iota(all.begin(), all.end(), begin);
    return all;
  }

  Probe ProbeOf(const ProbeOptions& options) const {
    const auto ones = [&](int columns) {
      return std::vector(config_.layers, std::vector<float>(columns, 1));
    };
    return Probe(options, {History(config_.layers, config_.channels), ones(config_.channels)},
                 {History(config_.layers, columns()), ones(columns())}, config_.head_dim);
  }
  int columns() const { return config_.columns(SiteKind::kHeads); }

  ForwardHarness model_;
  const ModelConfig& config_;
};

TEST_P(HeadProbeTest, KeepsTheHeadsThatProbedRowsHoldMostOf) {
  // Of eight rows of a later chunk all, and two evenly spread: the third and the seventh.
  const std::pair<ProbeOptions, std::vector<int>> probes[] = {
      {{.rows = ProbeOptions::Rows::kAll, .fuse = false, .keep = 1}, From(12, 20)},
      {{.rows = ProbeOptions::Rows::kSpread, .budget = 0.25, .fuse = false, .keep = 1}, {14, 18}}};
  for (const auto& [options, rows] : probes) {
    const auto step = [&] {
      Step(0, 0, 12, 0);
      return Step(0, 12, 20, 2);
    };
    RankBy(rows, Narrow());
    const std::vector<float> want = step();
    RankWrongly(Narrow());
    EXPECT_NE(step(), want);
    Probe probe = ProbeOf(options);
    model_.decoder().set_probe(&probe);
    EXPECT_EQ(step(), want);
    model_.decoder().set_probe(nullptr);
    EXPECT_EQ(probe.counts().rankings, 1);
    EXPECT_EQ(probe.counts().rows, static_cast<int64_t>(rows.size()));
  }
}

TEST_P(HeadProbeTest, RanksOnceForRungsOfOneStep) {
  std::vector<double> energies;
  AddEnergies(From(0, 20), 1, &energies);
  AddEnergies(From(0, 20), 2, &energies);
  const std::vector<int32_t> one = RandomIds(40, 1), other = RandomIds(40, 2);
  const ForwardHarness::Chunk chunks[] = {
      {.sequence = 0, .ids = std::span(one).first(20), .rung = 1},
      {.sequence = 1, .ids = std::span(other).first(20), .rung = 2}};
  RankBy(energies, Narrow());
  const std::vector<float> want = model_.Step(chunks);
  RankWrongly(Narrow());
  EXPECT_NE(model_.Step(chunks), want);
  Probe probe = ProbeOf({.rows = ProbeOptions::Rows::kAll, .fuse = false, .keep = 0.5});
  model_.decoder().set_probe(&probe);
  EXPECT_EQ(model_.Step(chunks), want);
  model_.decoder().set_probe(nullptr);
  // It was told of the heads that stayed, and of no others: of the second bucket, both rungs' rows.
  const std::span<const float> held = probe.history(SiteKind::kHeads).Energy(0, 1);
  const auto least = std::ranges::min_element(energies) - energies.begin();
  for (int head = 0; head < config_.heads; ++head) {
    EXPECT_EQ(held[head * config_.head_dim] > 0, head != least) << head;
  }
}

TEST_P(HeadProbeTest, RanksDecodeStepsByPromptsReadWhole) {
  RankBy(From(1, 20), Narrow(Of::kDecode));
  Step(0, 0, 20, 2);
  const std::vector<float> want = Step(0, 20, 21, 2);
  RankWrongly(Narrow(Of::kDecode));
  Probe probe = ProbeOf({.rows = ProbeOptions::Rows::kPrompts});
  model_.decoder().set_probe(&probe);
  Step(0, 0, 20, 2);
  EXPECT_EQ(probe.counts().rankings, 0);
  EXPECT_EQ(Step(0, 20, 21, 2), want);
  EXPECT_EQ(probe.counts().rankings, 1);
  model_.decoder().set_probe(nullptr);
}

TEST_P(HeadProbeTest, LooksBackAtWhatIsKnownAndKeepsAllForOnce) {
  model_.SetLadder(Narrow());
  Step(0, 0, 20, 0);
  const std::vector<float> want = Step(0, 20, 21, 2);
  Probe nothing = ProbeOf({.keep = 1, .refresh = 1});
  model_.decoder().set_probe(&nothing);
  EXPECT_EQ(Step(0, 20, 21, 2), want) << "by what there was";
  EXPECT_EQ(nothing.counts().rankings, 0);

  // The second of three decode steps keeps all, and the third looks back at what that held.
  model_.decoder().set_probe(nullptr);
  Step(0, 0, 20, 0);
  const std::vector<float> before = Step(0, 20, 21, 2), dense = Step(0, 21, 22, 0);
  // Of the first two heads, which stayed in the first step, history is half of either.
  std::vector<double> first, energies;
  AddEnergies({20}, 1, &first);
  AddEnergies({21}, 1, &energies);
  for (const int head : {0, 1}) energies[head] = (first[head] + energies[head]) / 2;
  Probe probe = ProbeOf({.keep = 0.5, .refresh = 1, .whole = 2});
  model_.decoder().set_probe(&probe);
  EXPECT_EQ(Step(0, 20, 21, 2), before);
  EXPECT_EQ(Step(0, 21, 22, 2), dense);
  for (const float energy : probe.history(SiteKind::kHeads).Energy(0, 3)) EXPECT_GT(energy, 0);
  EXPECT_EQ(probe.counts().rankings, 0);
  const std::vector<float> got = Step(0, 22, 23, 2);
  EXPECT_EQ(probe.counts().rankings, 1);
  model_.decoder().set_probe(nullptr);
  RankBy(energies, Narrow());
  EXPECT_EQ(Step(0, 22, 23, 2), got);
}

INSTANTIATE_TEST_SUITE_P(
    Models, HeadProbeTest,
    ::testing::Values(HeadCase{"f32", "tiny-llama.gguf", WeightPlan::kF32},
                      HeadCase{"int8", "tiny-llama.gguf", WeightPlan::kInt8},
                      HeadCase{"int4", "tiny-llama.gguf", WeightPlan::kInt4},
                      HeadCase{"biased", "tiny-qwen2-quantized.gguf", WeightPlan::kF32},
                      HeadCase{"normed", "tiny-qwen3-quantized.gguf", WeightPlan::kF32}),
    [](const auto& info) { return std::string(info.param.name); });

INSTANTIATE_TEST_SUITE_P(Weights, ProbeForwardTest,
                         ::testing::Values(WeightPlan::kF32, WeightPlan::kInt8, WeightPlan::kInt4),
                         [](const auto& info) { return std::string(WeightPlanName(info.param)); });

}  // namespace
}  // namespace espalier
