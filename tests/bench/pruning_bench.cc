// How much of the time that pruned channels should save is saved: rungs of the MLP's channels
// against dense in the same run, and a batch of mixed rungs against the area under its staircase.
//
//   pruning_bench MODEL [TURNS]
//
// Which channels stay matters to quality and not to time: here it is the first of each layer.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/pruning/channel_selector.h"
#include "tools/bench_run.h"
#include "tools/commit.h"
#include "tools/local_model.h"
#include "tools/machine.h"

namespace espalier {
namespace {

constexpr int kStepRows = 512;
constexpr int kDenseLayers = 3;  // the first, which bear pruning least

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

// Leaves out about `share` of the blocks' multiplications, as channels of all but the first layers.
KeepProfile Narrowed(const ModelConfig& config, double share) {
  const BlockCosts costs = CostsOfBlocks(config);
  const double layers = config.layers - kDenseLayers;
  const double kept = 1 - share * costs.all / (costs.mlp * layers / config.layers);
  KeepProfile keep = KeepProfile::Dense(config.sites());
  for (int layer = kDenseLayers; layer < config.layers; ++layer) {
    keep.Keep(layer, SiteKind::kChannels,
              static_cast<int>(std::lround(kept * config.channels / 64)) * 64);
  }
  return keep;
}

// The shortest steps seen, seconds.
struct Best {
  double all = HUGE_VAL;
  double products = HUGE_VAL;  // q, k, v, o and MLP
};

void Keep(const StepTotals& totals, Best* best) {
  if (totals.steps == 0) return;
  const PhaseTimes& p = totals.phases;
  best->all = std::min(best->all, totals.seconds / totals.steps);
  best->products = std::min(best->products, (p.attention_projections + p.mlp) / totals.steps);
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
  const int turns = argc > 2 ? std::max(1, std::atoi(argv[2])) : 5;
  absl::StatusOr<LocalModel> model = LoadLocalModel({.model = argv[1]}, 32 * 256, kStepRows);
  if (!model.ok()) {
    fmt::print(stderr, "pruning_bench: {}\n", model.status().ToString());
    return 1;
  }
  const ModelConfig& config = model->executor->config();
  Ladder ladder = Ladder::DenseOnly(config.sites());
  for (const double share : {0.2, 0.4}) {
    const KeepProfile keep = Narrowed(config, share);
    if (!ladder.Append({.prefill = keep, .decode = keep})) return 1;
  }
  const uint64_t bare = model->executor->ledger({}).weights;
  const absl::Status made = model->executor->SetLadder(ladder, StaticSelector(config.sites()));
  if (!made.ok()) {
    fmt::print(stderr, "pruning_bench: {}\n", made.ToString());
    return 1;
  }
  const double panels = static_cast<double>(model->executor->ledger({}).weights - bare);
  const BenchEngine engine{.executor = model->executor.get(),
                           .geometry = model->executor->kv_geometry(),
                           .ladder = &model->executor->ladder(),
                           .vocabulary = config.vocabulary,
                           .step_rows = kStepRows};

  const Shape shapes[] = {
      {"prefill_512", {.batch = 1, .prompt = 512, .generate = 1}, true},
      {"prefill_8x128", {.batch = 8, .prompt = 128, .generate = 1}, true},
      {"decode_b1", {.batch = 1, .prompt = 128, .generate = 96}, false},
      {"decode_b8", {.batch = 8, .prompt = 128, .generate = 64}, false},
      {"decode_b24", {.batch = 24, .prompt = 128, .generate = 32}, false},
      {"decode_b32", {.batch = 32, .prompt = 128, .generate = 32}, false},
  };
  const std::vector<std::vector<int>> lots = {{0}, {1}, {2}, {0, 1, 2}};
  std::map<std::pair<std::string, size_t>, Best> best;
  CpuWatch watch;
  for (int turn = 0; turn < turns; ++turn) {
    for (const Shape& shape : shapes) {
      for (size_t lot = 0; lot < lots.size(); ++lot) {
        BenchShape run = shape.shape;
        run.rungs = lots[lot];
        const absl::StatusOr<BenchResult> result =
            RunBench(engine, run, turn + 1, [](int64_t, int64_t) {});
        if (!result.ok()) {
          fmt::print(stderr, "pruning_bench: {}\n", result.status().ToString());
          return 1;
        }
        Keep(shape.prefill ? result->prefill : result->decode, &best[{shape.name, lot}]);
      }
    }
  }

  nlohmann::ordered_json figures = {
      {"machine", fmt::format("{}, {} threads", MachineName(), model->threads)},
      {"commit", kCommit},
      {"turns", turns},
      {"panel_bytes", panels}};
  fmt::print("{}, {} threads, best of {} turns; panels {:.1f} MB\n\n", MachineName(),
             model->threads, turns, panels / 1e6);
  fmt::print("{:>14} {:>12} {:>10} {:>10} {:>10} {:>12}\n", "", "of blocks", "ms a step", "ideal",
             "of dense", "of saving");
  for (const Shape& shape : shapes) {
    const Best& dense = best[{shape.name, 0}];
    fmt::print("{:>14} {:>12} {:>10.3f}\n", shape.name, "dense", 1e3 * dense.all);
    for (const int rung : {1, 2}) {
      const Best& pruned = best[{shape.name, rung}];
      const double share = ShareOfBlocks(config, ladder.rung(rung).decode);
      const double ideal = dense.all - share * dense.products;
      const double saving = (dense.all - pruned.all) / (dense.all - ideal);
      fmt::print("{:>14} {:>10.1f} % {:>10.3f} {:>10.3f} {:>8.1f} % {:>10.1f} %\n", "", 100 * share,
                 1e3 * pruned.all, 1e3 * ideal, 100 * pruned.all / dense.all, 100 * saving);
      figures[fmt::format("ideal_{}_{}", shape.name, rung * 20)] = saving;
    }
    if (shape.shape.batch < 8) continue;
    double area = 0;
    for (int i = 0; i < shape.shape.batch; ++i) area += best[{shape.name, i % 3}].all;
    area /= shape.shape.batch;
    const double mixed = best[{shape.name, 3}].all;
    fmt::print("{:>14} {:>12} {:>10.3f} {:>10.3f} {:>8.1f} % of the area\n", "", "all three",
               1e3 * mixed, 1e3 * area, 100 * mixed / area);
    figures[fmt::format("staircase_over_area_{}", shape.name)] = mixed / area;
  }
  if (const auto others = watch.OthersShare()) {
    figures["others_cpu_share"] = *others;
    if (*others > 0.05)
      fmt::print("warning: other processes took {:.0f} % of the cores\n", 100 * *others);
  }
  const std::string out = ESPALIER_FIGURES "/bench-pruning.json";
  std::filesystem::create_directories(ESPALIER_FIGURES);
  std::ofstream(out) << figures.dump(2) << "\n";
  fmt::print("\nfigures: {}\n", out);
  return 0;
}

}  // namespace
}  // namespace espalier

int main(int argc, char** argv) { return espalier::Main(argc, argv); }
