// How much of the time that pruned channels should save is saved: rungs of the MLP's channels
// against dense in the same run, and a batch of mixed rungs against the area under its staircase.
//
//   pruning_bench MODEL [TURNS]
//
// Which channels stay, and what `down` is refitted to, matters to quality and not to time: here it
// is the first of each layer, and zeros, in the 4 bits that calibration writes.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/model/down_norms.h"
#include "engine/pruning/channel_selector.h"
#include "engine/pruning/probe.h"
#include "tools/bench_run.h"
#include "tools/commit.h"
#include "tools/ladder_plan.h"
#include "tools/local_model.h"
#include "tools/machine.h"
#include "tools/statistics.h"

namespace espalier {
namespace {

constexpr int kStepRows = 512;
constexpr double kProbeBudget = 0.015;  // of the rows, as the server
constexpr int kLearnRows = 64;          // as the server

// Multiplications of a row in all blocks' products, and in their MLPs.
struct BlockCosts {
  double all = 0;
  double mlp = 0;
};

BlockCosts CostsOfBlocks(const ModelConfig& config) {
  const double attention = 2.0 * config.hidden * config.head_dim * (config.heads + config.kv_heads);
  const double mlp = 3.0 * config.hidden * config.channels;
  return {.all = config.layers * (attention + mlp), .mlp = config.layers * mlp};
}

double ShareOfBlocks(const ModelConfig& config, const KeepProfile& keep) {
  double left = 0;
  for (int layer = 0; layer < config.layers; ++layer) {
    left += 3.0 * config.hidden * (config.channels - keep.kept(layer, SiteKind::kChannels));
  }
  return left / CostsOfBlocks(config).all;
}

class ZeroRefits final : public ChannelSelector {
 public:
  explicit ZeroRefits(const ModelConfig& config)
      : rankings_(config.sites()),
        hidden_(config.hidden),
        groups_(static_cast<size_t>(config.hidden) * config.channels / kQuantGroup) {}

  std::span<const int32_t> Ranking(int layer, SiteKind kind) const override {
    return rankings_.Ranking(layer, kind);
  }
  Refit RefitOf(int /*layer*/, int count) const override {
    return {.down = std::span(groups_).first(static_cast<size_t>(hidden_) * count / kQuantGroup)};
  }

 private:
  StaticSelector rankings_;
  int hidden_;
  std::vector<FourBitGroup> groups_;
};

// Rungs 1 and 2 leave out about 20 and 40 % of the blocks' multiplications, as channels, from
// layers as `espalier calibrate` does if not told otherwise.
absl::StatusOr<Ladder> PlanShares(const ModelConfig& config) {
  const BlockCosts costs = CostsOfBlocks(config);
  std::vector<double> ratios;
  std::vector<RungPlan> plans;
  for (const double share : {0.2, 0.4}) {
    ratios.push_back(share * costs.all / costs.mlp);
    plans.push_back({.ratio = ratios.back()});
  }
  return PlanLadder({.dense_layers = kDenseLayers,
                     .left_out = ratios,
                     .last_dense_layers = kLastDenseLayers,
                     .slope = kSlope},
                    config, plans, {});
}

// A step of one run, seconds.
struct Step {
  double all = 0;
  double products = 0;  // q, k, v, o and MLP
  double probe = 0;
  double gather = 0;
};

Step StepOf(const StepTotals& totals) {
  const PhaseTimes& p = totals.phases;
  return {.all = totals.seconds / totals.steps,
          .products = (p.attention_projections + p.mlp) / totals.steps,
          .probe = p.probe / totals.steps,
          .gather = p.gather / totals.steps};
}

// Of fn(turn) over all turns: what is compared was measured one right after the other.
template <typename Fn>
double MedianOf(int turns, const Fn& fn) {
  std::vector<double> values;
  for (int turn = 0; turn < turns; ++turn) values.push_back(fn(turn));
  return Median(values);
}

struct Shape {
  std::string name;
  BenchShape shape;
  bool prefill;
};

int Main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fmt::print(stderr, "usage: pruning_bench MODEL [TURNS]\n");
    return 2;
  }
  const int turns = argc > 2 ? std::max(1, std::atoi(argv[2])) : 9;
  absl::StatusOr<LocalModel> model = LoadLocalModel({.model = argv[1]}, 32 * 256, kStepRows);
  if (!model.ok()) {
    fmt::print(stderr, "pruning_bench: {}\n", model.status().ToString());
    return 1;
  }
  const ModelConfig& config = model->executor->config();
  const absl::StatusOr<Ladder> planned = PlanShares(config);
  const uint64_t bare = model->executor->ledger({}).weights;
  const ZeroRefits refits(config);
  const absl::Status made =
      planned.ok() ? model->executor->SetLadder(*planned, refits) : planned.status();
  if (!made.ok()) {
    fmt::print(stderr, "pruning_bench: {}\n", made.ToString());
    return 1;
  }
  const Ladder& ladder = *planned;
  const Ladder dense_only = Ladder::DenseOnly(config.sites());
  const double panels = static_cast<double>(model->executor->ledger({}).weights - bare);
  const BenchEngine engine{.executor = model->executor.get(),
                           .geometry = model->executor->kv_geometry(),
                           .ladder = &model->executor->ladder(),
                           .vocabulary = config.vocabulary,
                           .step_rows = kStepRows};

  const Shape shapes[] = {
      {"prefill", {.batch = 1, .prompt = 512, .generate = 1}, true},
      {"prefill_8x128", {.batch = 8, .prompt = 128, .generate = 1}, true},
      {"decode_b1", {.batch = 1, .prompt = 128, .generate = 96}, false},
      {"decode_b8", {.batch = 8, .prompt = 128, .generate = 64}, false},
      {"decode_b24", {.batch = 24, .prompt = 128, .generate = 32}, false},
      {"decode_b32", {.batch = 32, .prompt = 128, .generate = 32}, false},
  };
  const std::vector<std::vector<int>> lots = {{0}, {1}, {2}, {0, 1, 2}};
  // With a `down` refitted for each count, and with one that all rungs share.
  std::map<std::pair<std::string, size_t>, std::vector<Step>> steps, sharing;  // [turns]
  std::map<std::string, std::vector<double>> over_bare;  // rung 0, to without panels, [turns]
  // Of prefill steps: the probe's share of their time, and what they take to those without one.
  std::map<std::string, std::vector<double>> probe_share, gather_share, over_unprobed;  // [turns]
  const absl::StatusOr<std::vector<std::vector<float>>> norms =
      PpspNorms(*model->file, SiteKind::kChannels);
  if (!norms.ok()) return 1;
  Probe probe(
      {.rows = ProbeOptions::Rows::kSpread, .budget = kProbeBudget, .learn_rows = kLearnRows},
      ProbeSites{History(config.layers, config.channels), *norms});
  CpuWatch watch;
  const auto measure = [&](const Shape& shape, const std::vector<int>& rungs,
                           int turn) -> absl::StatusOr<Step> {
    BenchShape run = shape.shape;
    run.rungs = rungs;
    const absl::StatusOr<BenchResult> result =
        RunBench(engine, run, turn + 1, [](int64_t, int64_t) {});
    if (!result.ok()) return result.status();
    return StepOf(shape.prefill ? result->prefill : result->decode);
  };
  const auto measure_lots = [&](const Shape& shape, int turn, auto* to) -> absl::Status {
    for (size_t lot = 0; lot < lots.size(); ++lot) {
      const absl::StatusOr<Step> step = measure(shape, lots[lot], turn);
      if (!step.ok()) return step.status();
      (*to)[{shape.name, lot}].push_back(*step);
    }
    return absl::OkStatus();
  };
  const auto all_turns = [&]() -> absl::Status {
    for (int turn = 0; turn < turns; ++turn) {
      // Dense with the machinery there and without, one right after the other.
      for (const Shape& shape : shapes) {
        double seconds[2];
        for (const bool with_panels : {false, true}) {
          const absl::Status set =
              model->executor->SetLadder(with_panels ? ladder : dense_only, refits);
          if (!set.ok()) return set;
          const absl::StatusOr<Step> step = measure(shape, {0}, turn);
          if (!step.ok()) return step.status();
          seconds[with_panels] = step->all;
        }
        over_bare[shape.name].push_back(seconds[1] / seconds[0]);
      }
      for (const Shape& shape : shapes) {
        const absl::Status status = measure_lots(shape, turn, &steps);
        if (!status.ok()) return status;
      }
      const absl::Status set = model->executor->SetLadder(ladder, StaticSelector(config.sites()));
      if (!set.ok()) return set;
      for (const Shape& shape : shapes) {
        if (shape.shape.batch < 8) continue;
        const absl::Status status = measure_lots(shape, turn, &sharing);
        if (!status.ok()) return status;
      }
      for (const Shape& shape : shapes) {
        if (!shape.prefill) continue;
        const absl::StatusOr<Step> without = measure(shape, {2}, turn);
        if (!without.ok()) return without.status();
        model->executor->set_probe(&probe);
        const absl::StatusOr<Step> with = measure(shape, {2}, turn);
        model->executor->set_probe(nullptr);
        if (!with.ok()) return with.status();
        probe_share[shape.name].push_back(with->probe / with->all);
        gather_share[shape.name].push_back(with->gather / with->all);
        over_unprobed[shape.name].push_back(with->all / without->all);
      }
    }
    return absl::OkStatus();
  };
  if (const absl::Status status = all_turns(); !status.ok()) {
    fmt::print(stderr, "pruning_bench: {}\n", status.ToString());
    return 1;
  }

  nlohmann::ordered_json figures = {
      {"machine", fmt::format("{}, {} threads", MachineName(), model->threads)},
      {"commit", kCommit},
      {"turns", turns},
      {"panel_bytes", panels}};
  fmt::print("{}, {} threads, medians of {} turns; panels {:.1f} MB\n\n", MachineName(),
             model->threads, turns, panels / 1e6);
  fmt::print("{:>14} {:>12} {:>10} {:>10} {:>10} {:>12}\n", "", "of blocks", "ms a step", "ideal",
             "got", "of saving");
  double worst_area = 0, worst_rung0 = 0, worst_probe = 0, worst_gather = 0;
  for (const Shape& shape : shapes) {
    const auto step = [&](int lot, int turn) -> const Step& {
      return steps[{shape.name, lot}][turn];
    };
    const auto median = [&](const auto& fn) { return MedianOf(turns, fn); };
    const double dense = median([&](int t) { return step(0, t).all; });
    fmt::print("{:>14} {:>12} {:>10.3f}\n", shape.name, "dense", 1e3 * dense);
    for (const int rung : {1, 2}) {
      const double share = ShareOfBlocks(config, ladder.rung(rung).decode);
      const double ideal =
          median([&](int t) { return 1 - share * step(0, t).products / step(0, t).all; });
      const double got = median([&](int t) { return step(rung, t).all / step(0, t).all; });
      fmt::print("{:>14} {:>10.1f} % {:>10.3f} {:>8.1f} % {:>8.1f} % {:>10.1f} %\n", "",
                 100 * share, 1e3 * median([&](int t) { return step(rung, t).all; }), 100 * ideal,
                 100 * got, 100 * (1 - got) / (1 - ideal));
      figures[fmt::format("ideal_{}_{}", shape.name, rung * 20)] = (1 - got) / (1 - ideal);
    }
    const double rung0 = MedianOf(turns, [&](int t) { return over_bare[shape.name][t]; });
    fmt::print("{:>14} {:>12} {:>32.1f} % of the time without panels\n", "", "rung 0", 100 * rung0);
    figures[fmt::format("rung0_cost_{}", shape.name)] = rung0 - 1;
    worst_rung0 = std::max(worst_rung0, rung0 - 1);
    if (shape.prefill) {
      const double share = Median(probe_share[shape.name]);
      const double gather = Median(gather_share[shape.name]);
      fmt::print(
          "{:>14} {:>12} {:>10.1f} % of the step and {:.1f} % to gather panels; it takes "
          "{:.1f} % of one without\n",
          "", "probe", 100 * share, 100 * gather, 100 * Median(over_unprobed[shape.name]));
      figures[fmt::format("probe_share_{}", shape.name)] = share;
      figures[fmt::format("gather_share_{}", shape.name)] = gather;
      figures[fmt::format("probed_over_unprobed_{}", shape.name)] =
          Median(over_unprobed[shape.name]);
      worst_probe = std::max(worst_probe, share);
      worst_gather = std::max(worst_gather, gather);
    }
    if (shape.shape.batch < 8) continue;
    const auto over_area = [&](auto& of) {
      return median([&](int t) {
        double area = 0;
        for (int i = 0; i < shape.shape.batch; ++i) {
          area += of[{shape.name, static_cast<size_t>(i % 3)}][t].all;
        }
        return of[{shape.name, 3}][t].all / (area / shape.shape.batch);
      });
    };
    const double over = over_area(steps), shared = over_area(sharing);
    fmt::print("{:>14} {:>12} {:>10.3f} {:>21.1f} % of the area; sharing `down`: {:.1f} %\n", "",
               "all three", 1e3 * median([&](int t) { return step(3, t).all; }), 100 * over,
               100 * shared);
    figures[fmt::format("staircase_over_area_{}", shape.name)] = over;
    figures[fmt::format("staircase_sharing_{}", shape.name)] = shared;
    worst_area = std::max(worst_area, over);
  }
  figures["staircase_over_area"] = worst_area;
  figures["rung0_cost"] = worst_rung0;
  figures["probe_share"] = worst_probe;
  figures["gather_share"] = worst_gather;
  if (const auto others = watch.OthersShare()) {
    figures["others_cpu_share"] = *others;
    if (*others > 0.05)
      fmt::print("warning: other processes took {:.0f} % of the cores\n", 100 * *others);
  }
  const std::string out = ESPALIER_FIGURES "/bench-pruning-speed.json";
  std::filesystem::create_directories(ESPALIER_FIGURES);
  std::ofstream(out) << figures.dump(2) << "\n";
  fmt::print("\nfigures: {}\n", out);
  return 0;
}

}  // namespace
}  // namespace espalier

int main(int argc, char** argv) { return espalier::Main(argc, argv); }
