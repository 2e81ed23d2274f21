// `espalier bench`: how fast the engine is in this process, and how close that is to what the
// machine can do.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "engine/machine_memory.h"
#include "engine/pruning/channel_moments.h"
#include "engine/pruning/weights/input_moments.h"
#include "tools/bench_run.h"
#include "tools/command.h"
#include "tools/cost_fit.h"
#include "tools/figures.h"
#include "tools/local_model.h"
#include "tools/machine.h"
#include "tools/progress.h"
#include "tools/roofline.h"
#include "tools/statistics.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

struct Options {
  LocalModelOptions model;
  std::vector<int> batches = {1, 8, 32};
  int prompt = 128;
  int generate = 128;
  int long_prompt = 512;
  int step_rows = 512;
  int turns = 3;
  uint64_t seed = 1;
  int footprint_mib = 0;
  bool phases = false;
  std::string figures = "build/figures/bench.json";
  int gather = 0;           // steps, of which one gathers moments; 0: none does
  int gather_channels = 0;  // the same of channels
  std::string fit;          // costs to write, in place of all else
  std::string ladder;
};

// Medians over the turns, and their bounds.
struct Row {
  BenchShape shape;
  double prefill = 0;
  double prefill_roofline = 0;
  double decode = 0;  // 0: nothing was decoded
  double decode_roofline = 0;
  double total = 0;
  StepTotals prefill_steps;  // of the last turn
  StepTotals decode_steps;
};

using Json = nlohmann::ordered_json;

// Others' share of the cores above which figures are too low to be believed.
constexpr double kDisturbed = 0.05;

absl::StatusOr<Row> Measure(const Options& options, const BenchEngine& engine,
                            const BenchShape& shape, const MachineCeilings& ceilings,
                            const ModelCosts& costs) {
  Row row{.shape = shape};
  std::vector<double> prefill, decode, total;
  for (int turn = 0; turn < options.turns; ++turn) {
    Progress bar(fmt::format("batch {}, prompt {}, turn {}/{}", shape.batch, shape.prompt, turn + 1,
                             options.turns));
    absl::StatusOr<BenchResult> result =
        RunBench(engine, shape, options.seed + turn,
                 [&](int64_t done, int64_t all) { bar.Update(done, all); });
    if (!result.ok()) return result.status();
    prefill.push_back(result->prefill.tokens_per_s());
    decode.push_back(result->decode.tokens_per_s());
    total.push_back(result->total_tokens_per_s(shape));
    row.prefill_steps = result->prefill;
    row.decode_steps = result->decode;
  }
  row.prefill = Median(prefill);
  row.decode = Median(decode);
  row.total = Median(total);
  row.prefill_roofline =
      PrefillRoofline(ceilings, costs, shape.batch, shape.prompt, options.step_rows);
  row.decode_roofline =
      DecodeRoofline(ceilings, costs, shape.batch, shape.prompt + shape.generate / 2.0);
  return row;
}

void PrintRow(const Row& row) {
  fmt::print("{:>5} {:>6} {:>8} {:>14.0f} {:>8.1f} %", row.shape.batch, row.shape.prompt,
             row.shape.generate, row.prefill, 100 * row.prefill / row.prefill_roofline);
  if (row.decode > 0) {
    fmt::print("  {:>13.1f} {:>8.1f} %  {:>11.1f}", row.decode,
               100 * row.decode / row.decode_roofline, row.total);
  }
  fmt::print("\n");
}

void PrintPhases(const Row& row) {
  const auto line = [&](const char* kind, const StepTotals& totals) {
    if (totals.steps == 0) return;
    const PhaseTimes& p = totals.phases;
    const double named =
        p.embed + p.attention_projections + p.attention + p.mlp + p.norm + p.head + p.sampling;
    fmt::print("{:>5} {:>7} {:>6} {:>9.3f}", row.shape.batch, kind, totals.steps,
               1e3 * totals.seconds / totals.steps);
    for (const double seconds : {p.attention_projections, p.attention, p.mlp, p.norm, p.embed,
                                 p.head, p.sampling, totals.seconds - named}) {
      fmt::print(" {:>9.3f}", 1e3 * seconds / totals.steps);
    }
    fmt::print("\n");
  };
  line("prefill", row.prefill_steps);
  line("decode", row.decode_steps);
}

void AddFigures(const Row& row, Json* figures) {
  const std::string at = fmt::format("_p{}_b{}", row.shape.prompt, row.shape.batch);
  const auto add = [&](const char* kind, double value, double roofline) {
    (*figures)[kind + at + "_tokens_per_s"] = value;
    (*figures)[kind + at + "_roofline_tokens_per_s"] = roofline;
    (*figures)[kind + at + "_roofline_share"] = value / roofline;
  };
  add("prefill", row.prefill, row.prefill_roofline);
  if (row.decode == 0) return;
  add("decode", row.decode, row.decode_roofline);
  (*figures)["total" + at + "_tokens_per_s"] = row.total;
}

// What a step that gathers takes for it, seconds: the median of some.
double TimeGathering(int rows, int channels, Backend* backend) {
  using Clock = std::chrono::steady_clock;
  const std::vector<float> hidden(static_cast<size_t>(rows) * channels, 1);
  std::vector<int> listed(rows);
  std::iota(listed.begin(), listed.end(), 0);
  ChannelMoments moments(1, channels);
  std::vector<double> seconds;
  for (int turn = 0; turn < 31; ++turn) {
    const Clock::time_point begun = Clock::now();
    moments.Add(0, ConstMatrix(hidden.data(), rows, channels), listed, {}, backend);
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begun).count());
  }
  return Median(seconds);
}

absl::Status Run(const Options& options) {
  std::vector<BenchShape> shapes;
  int64_t kv_tokens = 0;  // the pool holds the largest run whole
  for (const int batch : options.batches) {
    shapes.push_back({.batch = batch, .prompt = options.prompt, .generate = options.generate});
    kv_tokens = std::max(kv_tokens, batch * PagedTokens(options.prompt + options.generate));
  }
  if (options.long_prompt > 0) {
    shapes.push_back({.batch = 1, .prompt = options.long_prompt, .generate = 1});
    kv_tokens = std::max(kv_tokens, PagedTokens(options.long_prompt + 1));
  }

  absl::StatusOr<LocalModel> model = LoadLocalModel(options.model, kv_tokens, options.step_rows);
  if (!model.ok()) return model.status();
  const ModelConfig& config = model->executor->config();
  const double weight_bytes = static_cast<double>(model->executor->ledger({}).weights);
  const KvPoolShape kv_page = {
      .type = model->kv, .pages = 1, .kv_heads = config.kv_heads, .head_dim = config.head_dim};
  const std::string types = model->executor->weight_types();
  const ModelCosts costs =
      CostsOf(config, weight_bytes,
              types == "f32" || types == "bf16" ? WeightType::kF32 : WeightType::kInt8,
              kv_page.page_bytes() / double{2 * kPageTokens} / (config.kv_heads * config.head_dim));

  MeasuredCeilings ceilings;
  CpuWatch watch;
  {
    Progress bar("measuring the machine");
    ceilings = MeasureCeilings(model->isa, model->threads, size_t(options.footprint_mib) << 20,
                               [&](int done, int total) { bar.Update(done, total); });
  }
  const std::string machine =
      fmt::format("{}, {}, {} threads", MachineName(), IsaName(model->isa), model->threads);
  fmt::print("{}, {:.0f} MB of {} weights, {} KV\n{}\n", config.name, weight_bytes / 1e6,
             model->executor->weight_types(), KvTypeName(model->kv), machine);
  fmt::print(
      "DRAM read {:.1f} GB/s with 1 thread, {:.1f} GB/s with {} ({} MiB read); int8 {:.0f} GOP/s, "
      "fp32 {:.0f} GFLOP/s\n",
      ceilings.read_bytes_per_s_1 / 1e9, ceilings.all.read_bytes_per_s / 1e9, model->threads,
      ceilings.read_footprint >> 20, ceilings.all.int8_ops_per_s / 1e9,
      ceilings.all.f32_ops_per_s / 1e9);
  if (LastLevelCacheBytes() > weight_bytes) {
    fmt::print("the cache of {} MiB may hold the weights: decode can exceed the DRAM roofline\n",
               LastLevelCacheBytes() >> 20);
  }

  const BenchEngine engine{.executor = model->executor.get(),
                           .geometry = model->executor->kv_geometry(),
                           .ladder = &model->executor->ladder(),
                           .vocabulary = config.vocabulary,
                           .step_rows = options.step_rows};
  InputMoments moments(config);
  if (options.gather > 0) model->executor->set_input_moments(&moments, options.gather);
  std::optional<ChannelMoments> channels;
  if (options.gather_channels > 0) {
    channels.emplace(config.layers, config.channels);
    model->executor->set_channel_moments(&*channels, options.gather_channels);
  }
  const absl::StatusOr<BenchResult> warm = RunBench(
      engine, {.batch = 1, .prompt = 16, .generate = 8}, options.seed, [](int64_t, int64_t) {});
  if (!warm.ok()) return warm.status();

  fmt::print("\n{:>5} {:>6} {:>8} {:>14} {:>10}  {:>13} {:>10}  {:>11}\n", "batch", "prompt",
             "generate", "prefill tok/s", "roofline", "decode tok/s", "roofline", "total tok/s");
  std::vector<Row> rows;
  for (const BenchShape& shape : shapes) {
    absl::StatusOr<Row> row = Measure(options, engine, shape, ceilings.all, costs);
    if (!row.ok()) return row.status();
    PrintRow(*row);
    rows.push_back(*std::move(row));
  }
  if (options.phases) {
    fmt::print(
        "\nms per step\n{:>5} {:>7} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
        "batch", "kind", "steps", "all", "qkvo", "attention", "mlp", "norm", "embed", "head",
        "sampling", "other");
    for (const Row& row : rows) PrintPhases(row);
  }
  model->file.reset();  // nothing of it is needed any more
  const Ledger ledger =
      model->executor->ledger({.pages_free = model->executor->kv_geometry().pages});
  const double resident = static_cast<double>(ResidentMemoryBytes());
  const double needed = static_cast<double>(ledger.weights + ledger.kv_free);
  fmt::print(
      "\nresident {:.1f} MB; weights {:.1f} + KV {:.1f} MB, workspace {:.1f} MB: {:.2f} of weights "
      "and KV\n",
      resident / 1e6, static_cast<double>(ledger.weights) / 1e6,
      static_cast<double>(ledger.kv_free) / 1e6, static_cast<double>(ledger.workspace) / 1e6,
      resident / needed);
  const std::optional<double> others = watch.OthersShare();
  if (others.value_or(0) > kDisturbed) {
    fmt::print(stderr, "warning: other processes took {:.0f} % of the cores: figures are too low\n",
               100 * *others);
  }
  if (options.gather > 0) {
    fmt::print("moments of {} rows gathered, in one of {} steps of whole rows\n", moments.tokens(),
               options.gather);
  }
  if (channels.has_value()) {
    for (const int rows : {ModelExecutor::kGatheredRows, ChannelMoments::kMostRows}) {
      fmt::print("{} rows of {} channels are added in {:.2f} ms\n", rows, config.channels,
                 1e3 * TimeGathering(rows, config.channels, model->backend.get()));
    }
    fmt::print(
        "channel moments of {} rows or more of each layer gathered, of one in one of {} "
        "steps of whole rows\n",
        channels->tokens(), options.gather_channels);
  }
  if (options.figures.empty()) return absl::OkStatus();

  Json figures = {{"model", config.name},
                  {"weights", model->executor->weight_types()},
                  {"turns", options.turns},
                  {"threads", model->threads},
                  {"generated_tokens", options.generate},
                  {"weight_bytes", weight_bytes},
                  {"resident_bytes", resident},
                  {"resident_per_weights_and_kv", resident / needed},
                  {"kv_bytes_per_token", costs.kv_bytes_per_token},
                  {"dram_read_1_thread_bytes_per_s", ceilings.read_bytes_per_s_1},
                  {"dram_read_bytes_per_s", ceilings.all.read_bytes_per_s},
                  {"int8_ops_per_s", ceilings.all.int8_ops_per_s},
                  {"f32_ops_per_s", ceilings.all.f32_ops_per_s}};
  if (others) figures["others_cpu_share"] = *others;
  for (const Row& row : rows) AddFigures(row, &figures);
  return WriteFigures(options.figures, std::move(figures));
}

}  // namespace

void AddBench(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "bench",
      "Measure prefill and decode tokens/s in this process, and their share of the roofline");
  AddLocalModelOptions(*sub, &options->model);
  sub->add_option("--batch", options->batches, "Requests that arrive together, comma separated")
      ->type_name("COUNT")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->default_str("1,8,32");
  const auto count = [&](const char* name, int& value, int least, int most, const char* unit,
                         const char* description) {
    sub->add_option(name, value, description)
        ->type_name(unit)
        ->check(CLI::Range(least, most))
        ->capture_default_str();
  };
  count("--prompt", options->prompt, 1, 1 << 20, "TOKENS", "Length of each prompt, random ids");
  count("--generate", options->generate, 2, 1 << 20, "TOKENS",
        "Tokens drawn by each request, greedy; end tokens do not end it");
  count("--long-prompt", options->long_prompt, 0, 1 << 20, "TOKENS",
        "One more prefill, of a single prompt of this length; 0: none");
  count("--step-rows", options->step_rows, 1, 65536, "TOKENS", "Token budget of a step");
  count("--turns", options->turns, 1, 1000, "COUNT", "Runs of each; medians are told");
  sub->add_option("--seed", options->seed, "Seed of the random prompts")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->capture_default_str();
  count("--footprint", options->footprint_mib, 0, 1 << 20, "MIB",
        "Memory read over to measure DRAM; 0: twice the last cache, at least 256");
  count(
      "--gather", options->gather, 0, 1 << 20, "STEPS",
      "Of so many steps one sums its inputs, as a server with --moments-file does of 16; 0: none");
  count("--gather-channels", options->gather_channels, 0, 1 << 20, "STEPS",
        "Of so many steps one sums how a layer's channels go together, as a server with "
        "--channel-moments-file does of 8; 0: none");
  sub->add_flag("--phases", options->phases, "Also tell where a step's time goes, ms");
  sub->add_option("--figures", options->figures, "JSON file for the figures; empty: none")
      ->type_name("FILE")
      ->capture_default_str();
  sub->add_option("--fit", options->fit,
                  "Only time steps of many kinds, of every rung of --ladder, and write what they "
                  "take as a formula: what `espalier simulate` goes by")
      ->type_name("FILE");
  sub->add_option("--ladder", options->ladder, "For --fit; empty: the full model alone")
      ->type_name("PATH");
  sub->footer(
      "Roofline of a step: the larger of memory and compute time.\n"
      "  memory  = (weights read once + K and V of the context) / DRAM read bandwidth\n"
      "  compute = matrix operations / peak of the weight type + attention operations / fp32 peak\n"
      "with the bandwidth and the peaks measured first, with all threads. Decode: one row per\n"
      "request at the mean context, prompt + generate / 2. Prefill counts steps with prompt rows,\n"
      "decode those without.");
  sub->final_callback([options, action] {
    if (options->model.model.empty()) throw CLI::RequiredError("--model");
    if (options->fit.empty()) {
      *action = [options] { return Run(*options); };
      return;
    }
    *action = [options] {
      return FitStepCosts({.model = options->model,
                           .ladder = options->ladder,
                           .seed = options->seed,
                           .out = options->fit,
                           .figures = "build/figures/bench-fit.json"});
    };
  });
}

}  // namespace espalier
