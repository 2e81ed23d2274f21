// `espalier prune`: weights of a model to zero, offline, by SwiftPrune and by what it is compared
// with; the result is a model as any other.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/model/files/model_rewriter.h"
#include "engine/model/moments_file.h"
#include "engine/model/text/tokenizer.h"
#include "tools/command.h"
#include "tools/corpus.h"
#include "tools/interrupt.h"
#include "tools/local_model.h"
#include "tools/machine.h"
#include "tools/progress.h"
#include "tools/self_text.h"
#include "tools/value_checks.h"
#include "tools/weight_pruning.h"

namespace espalier {
namespace {

constexpr std::string_view kSelf = "self";
constexpr int kSelfBatch = 16;

struct Options {
  LocalModelOptions model;
  std::string method = "swift";
  std::string pattern = "2:4";
  std::vector<std::string> texts;
  std::string moments;
  int64_t tokens = 0;  // 0: the method's
  int window = 0;      // 0: the method's
  uint64_t seed = 1;
  std::string out;
  std::string store = "auto";
  std::string metric = "auto";
  std::string select = "auto";
  double alpha = 0.125;
  bool loose = false;
  std::string compensate = "auto";
  bool quality = false;
  std::string activations = "auto";
  bool skip_first = false;
  std::string json;
};

template <size_t kCount>
int IndexOf(const std::string_view (&names)[kCount], std::string_view name) {
  return static_cast<int>(std::ranges::find(names, name) - std::begin(names));
}

absl::Status Contradiction(std::string_view option, std::string_view why) {
  return absl::InvalidArgumentError(fmt::format("{}: {}", option, why));
}

// What a method stands for, and what of it the other options change.
absl::StatusOr<WeightPruningOptions> Plan(const Options& options) {
  WeightPruningOptions plan;
  plan.mask.pattern = *ParsePattern(options.pattern);
  plan.weights = static_cast<WeightPlan>(IndexOf(kWeightPlanNames, options.model.weights));
  plan.skip_first = options.skip_first;
  const bool swift = options.method == "swift";
  plan.compensate_mean = options.compensate == "auto" ? swift : options.compensate == "mean";
  if (options.window == 1) {
    return Contradiction("--window",
                         "of one token shows nothing but position 0, which is unlike "
                         "all others");
  }
  if (options.metric != "auto" && !swift) {
    return Contradiction("--metric", "of --method swift alone; others are metrics themselves");
  }
  if (options.method == "sparsegpt") {
    plan.method = WeightMethod::kSparseGpt;
    if (options.quality) return Contradiction("--quality", "SparseGPT has a whole Hessian already");
  } else if (options.quality) {
    if (!swift) return Contradiction("--quality", "of --method swift alone");
    if (options.metric != "auto") return Contradiction("--quality", "scores by its own metric");
    plan.method = WeightMethod::kBlockObs;
  } else {
    std::string metric = swift ? options.metric : options.method;
    if (metric == "auto") metric = plan.compensate_mean ? "fluctuation" : "wanda";
    plan.metric = static_cast<Metric>(IndexOf(kMetricNames, metric));
  }
  plan.mask.whole_matrix = options.method == "magnitude";
  if (options.select != "auto") {
    if (plan.method != WeightMethod::kScores || plan.mask.whole_matrix ||
        plan.mask.pattern.grouped()) {
      return Contradiction("--select", "of scores compared within a row, without groups, alone");
    }
    plan.mask.selection = static_cast<Selection>(IndexOf(kSelectionNames, options.select));
  }
  plan.mask.alpha = plan.mask.beta = static_cast<float>(options.alpha);
  plan.mask.strict = !options.loose;
  // Those that are published go through each layer twice; --quality loses less so (by 2 %).
  const bool once = swift && plan.method == WeightMethod::kScores;
  const std::string activations =
      options.activations == "auto" ? (once ? "sequential" : "pruned") : options.activations;
  plan.calibrated_on = static_cast<CalibratedOn>(IndexOf(kCalibratedOnNames, activations));
  return plan;
}

// Whether what a server gathered can stand for text: sums of columns, of the dense model.
absl::Status CheckMoments(const Options& options, const WeightPruningOptions& plan, bool looks) {
  if (!looks) return Contradiction("--moments", "this method looks at no inputs");
  if (!options.texts.empty()) {
    return Contradiction("--calibration",
                         "--moments says what inputs are; leave one of the two out");
  }
  if (plan.method != WeightMethod::kScores) {
    return Contradiction(options.quality ? "--quality" : "--method",
                         "needs products of columns, --moments has sums of each alone; name a "
                         "--calibration");
  }
  if (options.activations != "auto" && options.activations != "dense") {
    return Contradiction("--activations",
                         "--moments are of the model that was served; name a --calibration");
  }
  if (options.window > 0) return Contradiction("--window", "of --calibration; --moments are sums");
  if (options.tokens > 0)
    return Contradiction("--tokens", "of --calibration; --moments are taken whole");
  if (options.skip_first) return Contradiction("--skip-first", "of --calibration");
  return absl::OkStatus();
}

// What a run writes is nothing that it reads, and not twice the same.
absl::Status CheckPaths(const Options& options) {
  std::vector<std::pair<std::string_view, std::string>> read = {{"--model", options.model.model}};
  for (const std::string& text : options.texts) read.emplace_back("--calibration", text);
  if (!options.moments.empty()) read.emplace_back("--moments", options.moments);
  const auto same = [](const std::string& a, const std::string& b) {
    std::error_code error;
    return a == b || std::filesystem::equivalent(a, b, error);
  };
  for (const auto& [name, path] : read) {
    if (!options.json.empty() && same(options.json, path)) {
      return Contradiction("--json", fmt::format("would be written over {} {}", name, path));
    }
    if (name != "--model" && same(options.out, path)) {
      return Contradiction("--out", fmt::format("would be written over {} {}", name, path));
    }
  }
  if (options.json.empty()) return absl::OkStatus();
  if (same(options.json, options.out)) {
    return Contradiction("--json", fmt::format("would be written over --out {}", options.out));
  }
  const std::string folder = std::filesystem::absolute(options.json).parent_path().string();
  for (const auto& [name, path] :
       {std::pair("--model", options.model.model), std::pair("--out", options.out)}) {
    // Where any name may be that of its config.
    if (same(folder, path)) {
      return Contradiction("--json", fmt::format("lies in {} {}", name, path));
    }
  }
  if (std::error_code error; !std::filesystem::is_directory(folder, error)) {
    return absl::NotFoundError(fmt::format("--json: {}: no such folder", folder));
  }
  return absl::OkStatus();
}

int64_t TokensOf(const Options& options) {
  if (options.tokens > 0) return options.tokens;
  if (options.method == "sparsegpt") return 4096;
  return options.method == "swift" && !options.quality ? 2048 : 8192;
}

// Of 2,048 tokens, windows of 128 are 16 places of the text in place of 4: 2:4 loses 3 % less in
// perplexity. With 8,192 longer ones are better, by as much.
int WindowOf(const Options& options) {
  if (options.window > 0) return options.window;
  return options.method != "swift" ? 512 : options.quality ? 256 : 128;
}

// Windows to calibrate with, kinds in turns.
absl::StatusOr<std::vector<std::vector<int32_t>>> ReadWindows(const Options& options,
                                                              const ModelFile& file) {
  const auto tokenizer = Tokenizer::Create(file.vocabulary());
  if (!tokenizer.ok()) return tokenizer.status();
  const int window = WindowOf(options);
  const int64_t windows = std::max<int64_t>(1, TokensOf(options) / window);
  const auto kinds = static_cast<int64_t>(options.texts.size());
  std::vector<std::string> paths;
  std::ranges::copy_if(options.texts, std::back_inserter(paths),
                       [](const std::string& path) { return path != kSelf; });
  const int64_t each = (windows + kinds - 1) / kinds;
  absl::StatusOr<std::vector<TextKind>> read =
      ReadKinds(paths, **tokenizer, window, static_cast<int>(each));
  if (!read.ok()) return read.status();
  if (paths.size() < options.texts.size()) {
    // The whole model in memory, for as long as it writes.
    const absl::StatusOr<LocalModel> model =
        LoadLocalModel(options.model, kSelfBatch * PagedTokens(window + 1), 512);
    if (!model.ok()) return model.status();
    Progress bar("making up text");
    absl::StatusOr<std::vector<std::vector<int32_t>>> texts =
        MakeUpTexts(model->executor.get(), **tokenizer, static_cast<int>(each), window, kSelfBatch,
                    options.seed, [&](int64_t done, int64_t total) {
                      bar.Update(done, total);
                      return !Interrupt::raised();
                    });
    if (!texts.ok()) return texts.status();
    read->push_back({std::string(kSelf), *std::move(texts)});
  }
  std::vector<std::vector<int32_t>> all;
  for (size_t i = 0; all.size() < static_cast<size_t>(windows); ++i) {
    const size_t before = all.size();
    for (TextKind& kind : *read) {
      if (i < kind.windows.size() && all.size() < static_cast<size_t>(windows)) {
        all.push_back(std::move(kind.windows[i]));
      }
    }
    if (all.size() == before) break;  // the texts are shorter
  }
  return all;
}

BlockType TypeToStore(const Options& options, const ModelFile& file) {
  if (options.store == "f32") return BlockType::kF32;
  if (options.store == "bf16") return BlockType::kBF16;
  if (options.store == "f16") return BlockType::kF16;
  const auto pruned = std::ranges::find_if(file.tensors(), IsPruned);
  const bool is_float = pruned != file.tensors().end() && BlockValues(pruned->type) == 1;
  return is_float ? pruned->type : BlockType::kF16;
}

struct ForwardSeconds {
  double load = 0, forward = 0, statistics = 0;
};

ForwardSeconds ForwardOf(const WeightPruningReport& report) {
  ForwardSeconds sum;
  for (const WeightPruningReport::Layer& layer : report.layers) {
    sum.load += layer.load;
    sum.forward += layer.forward;
    sum.statistics += layer.statistics;
  }
  return sum;
}

// Sites of all layers together; the report as JSON has them one by one.
void PrintTable(const WeightPruningReport& report, double finish_s) {
  using Site = WeightPruningReport::Site;
  fmt::print("{:13}{:>12}{:>9}{:>15}{:>10}{:>10}{:>10}{:>10}\n", "matrix", "weights", "zeros",
             "saliency kept", "read, s", "select, s", "update, s", "write, s");
  const auto row = [](std::string_view name, const Site& site, bool saliency) {
    fmt::print("{:13}{:12}{:8.2f}%{:>15}{:10.3f}{:10.3f}{:10.3f}{:10.3f}\n", name, site.weights,
               100.0 * static_cast<double>(site.zeros) / static_cast<double>(site.weights),
               saliency && site.saliency > 0
                   ? fmt::format("{:.2f}%", 100 * site.kept / site.saliency)
                   : "",
               site.read, site.select, site.update, site.write);
  };
  for (size_t kind = 0; kind < kPrunedKinds.size(); ++kind) {
    row(kPrunedKinds[kind], report.Sum(kind), true);
  }
  // Scores of different matrices do not add up.
  row("all", report.Sum(), false);
  const ForwardSeconds forward = ForwardOf(report);
  fmt::print(
      "\nto see their inputs: load {:.2f} s, forward {:.2f} s, statistics {:.2f} s; to finish the "
      "file {:.2f} s; all {:.2f} s\n",
      forward.load, forward.forward, forward.statistics, finish_s, report.total_s + finish_s);
}

nlohmann::ordered_json ToJson(const Options& options, const WeightPruningReport& report,
                              double finish_s) {
  using Json = nlohmann::ordered_json;
  const auto site_json = [](const WeightPruningReport::Site& site) {
    return Json{{"weights", site.weights},
                {"zeros", site.zeros},
                {"saliency_kept", site.saliency > 0 ? site.kept / site.saliency : 0},
                {"read_s", site.read},
                {"select_s", site.select},
                {"update_s", site.update},
                {"write_s", site.write}};
  };
  const WeightPruningReport::Site all = report.Sum();
  const ForwardSeconds forward = ForwardOf(report);
  Json json = {{"method", options.method},
               {"pattern", options.pattern},
               {"tokens", report.tokens},
               {"machine", MachineName()},
               {"sparsity", static_cast<double>(all.zeros) / static_cast<double>(all.weights)},
               {"seconds",
                {{"load", forward.load},
                 {"forward", forward.forward},
                 {"statistics", forward.statistics},
                 {"read", all.read},
                 {"select", all.select},
                 {"update", all.update},
                 {"write", all.write + finish_s},
                 {"all", report.total_s + finish_s}}}};
  for (size_t kind = 0; kind < kPrunedKinds.size(); ++kind) {
    json["kinds"][std::string(kPrunedKinds[kind])] = site_json(report.Sum(kind));
  }
  json["layers"] = Json::array();
  for (const WeightPruningReport::Layer& layer : report.layers) {
    Json sites;
    for (size_t kind = 0; kind < kPrunedKinds.size(); ++kind) {
      sites[std::string(kPrunedKinds[kind])] = site_json(layer.sites[kind]);
    }
    json["layers"].push_back({{"load_s", layer.load},
                              {"forward_s", layer.forward},
                              {"statistics_s", layer.statistics},
                              {"sites", sites}});
  }
  return json;
}

absl::Status Run(const Options& options) {
  const Interrupt interrupt([] {});
  absl::StatusOr<WeightPruningOptions> plan = Plan(options);
  if (!plan.ok()) return plan.status();
  const bool looks = plan->method != WeightMethod::kScores || plan->compensate_mean ||
                     plan->metric != Metric::kMagnitude;
  if (absl::Status status = CheckPaths(options); !status.ok()) return status;
  const bool gathered = !options.moments.empty();
  if (gathered) {
    if (absl::Status status = CheckMoments(options, *plan, looks); !status.ok()) return status;
  } else if (looks && options.texts.empty()) {
    return Contradiction("--calibration",
                         "this method looks at inputs: name a text, or self, or --moments");
  }
  const absl::StatusOr<std::unique_ptr<ModelFile>> file = ModelFile::Open(options.model.model);
  if (!file.ok()) return file.status();
  std::optional<InputMoments> moments;
  if (gathered) {
    absl::StatusOr<InputMoments> read = ReadMoments(options.moments, **file);
    if (!read.ok()) return read.status();
    if (read->tokens() == 0) {
      return absl::InvalidArgumentError(
          fmt::format("{}: espalier.tokens: expected some, got 0", options.moments));
    }
    if (read->tokens() < TokensOf(options)) {
      fmt::print(stderr, "warning: {}: sums of {} tokens; {} of text are the default\n",
                 options.moments, read->tokens(), TokensOf(options));
    }
    moments = *std::move(read);
    plan->moments = &*moments;
  }
  // Before minutes are spent on what cannot be written.
  const absl::StatusOr<std::unique_ptr<ModelRewriter>> rewriter =
      ModelRewriter::Create(**file, options.out, TypeToStore(options, **file), IsPruned);
  if (!rewriter.ok()) return rewriter.status();
  std::vector<std::vector<int32_t>> windows;
  if (looks && !gathered) {
    absl::StatusOr<std::vector<std::vector<int32_t>>> read = ReadWindows(options, **file);
    if (!read.ok()) return read.status();
    windows = *std::move(read);
    const int64_t got = static_cast<int64_t>(windows.size()) * WindowOf(options);
    if (got < TokensOf(options) - WindowOf(options)) {
      fmt::print(stderr, "warning: --calibration has {} tokens in whole windows of {}, not {}\n",
                 got, WindowOf(options), TokensOf(options));
    }
  }
  Isa isa = SupportedIsas().back();
  if (options.model.isa != "auto") {
    const absl::StatusOr<Isa> asked = ParseIsa(options.model.isa);
    if (!asked.ok()) return asked.status();
    isa = *asked;
  }
  const absl::StatusOr<std::unique_ptr<Backend>> backend =
      CreateCpuBackend({.isa = isa, .threads = options.model.threads});
  if (!backend.ok()) return backend.status();
  Progress bar("pruning " + (*file)->config().name);
  absl::StatusOr<WeightPruningReport> report = PruneWeights(
      *plan, **file, windows, rewriter->get(), backend->get(), [&](int done, int total) {
        bar.Update(done, total);
        return !Interrupt::raised();
      });
  if (!report.ok()) return report.status();
  const auto begin = std::chrono::steady_clock::now();
  if (absl::Status status = (*rewriter)->Finish(); !status.ok()) return status;
  const double finish_s =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  PrintTable(*report, finish_s);
  fmt::print("{}: {} by {}, {} tokens of calibration\n", options.out, options.pattern,
             options.method, report->tokens);
  if (options.json.empty()) return absl::OkStatus();
  std::ofstream json(options.json);
  json << ToJson(options, *report, finish_s).dump(2) << "\n";
  json.close();
  return json ? absl::OkStatus()
              : absl::UnavailableError(fmt::format("{}: cannot be written", options.json));
}

CLI::Validator IsPattern() {
  const auto check = [](std::string& text) -> std::string {
    return ParsePattern(text).has_value()
               ? ""
               : fmt::format("expected a share in (0, 1), or N:M with N < M <= {}, got {}",
                             kMaxGroup, text);
  };
  return CLI::Validator(check, "");
}

}  // namespace

void AddPrune(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "prune", "Set weights of a model to zero, in seconds; write it as a model of its own");
  const auto choice = [&](const char* name, std::string& value, const char* description,
                          std::vector<std::string> values) {
    return sub->add_option(name, value, description)
        ->type_name("NAME")
        ->check(CLI::IsMember(std::move(values)))
        ->capture_default_str();
  };
  choice(
      "--method", options->method,
      "swift: one pass of scores over each row, no Hessian, no sort; the others to compare with, "
      "as published",
      {"swift", "wanda", "sparsegpt", "magnitude", "ria"});
  sub->add_option("--pattern", options->pattern,
                  "Which weights may go: a share of each row, above 0 and below 1, or all but N of "
                  "every M along it, as N:M, M up to 64")
      ->type_name("PATTERN")
      ->check(IsPattern())
      ->capture_default_str();
  sub->add_option("--calibration,--text", options->texts,
                  "Text to calibrate with: files or folders, which count alike; self: what the "
                  "model makes up")
      ->type_name("PATH");
  sub->add_option("--moments", options->moments,
                  "In place of text: what a server saw of the model's inputs, its --moments-file. "
                  "One pass over the weights, and no text is run")
      ->type_name("PATH");
  sub->add_option("--tokens", options->tokens,
                  "Tokens to calibrate with, of all texts; 0: 2048 for swift, 4096 for sparsegpt, "
                  "8192 for the others and --quality")
      ->type_name("TOKENS")
      ->check(CLI::Range(int64_t{0}, int64_t{100'000'000}))
      ->capture_default_str();
  sub->add_option("--window", options->window,
                  "Tokens of a window, which starts a text of its own; 0: 128 for swift, 256 with "
                  "--quality, 512 for the others")
      ->type_name("TOKENS")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  sub->add_option("--seed", options->seed, "Of the text that the model makes up")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->capture_default_str();
  sub->add_option("--out", options->out,
                  "What to write: a .gguf of a .gguf; of a folder a folder, or "
                  "FOLDER/model.safetensors. It is there once it is whole")
      ->type_name("PATH")
      ->required();
  choice("--store", options->store,
         "Type of the pruned matrices; auto: the model's own if that is a float type, else f16",
         {"auto", "f16", "bf16", "f32"});
  std::vector<std::string> metrics = {"auto"};
  metrics.insert(metrics.end(), std::begin(kMetricNames), std::end(kMetricNames));
  choice("--metric", options->metric,
         "What swift scores by; lscore as published; fluctuation: Wanda's around the inputs' "
         "means, for --compensate mean; auto, what measured best: fluctuation, or wanda with "
         "--compensate none",
         metrics);
  std::vector<std::string> selections = {"auto"};
  selections.insert(selections.end(), std::begin(kSelectionNames), std::end(kSelectionNames));
  choice("--select", options->select,
         "What a share of a row is found by; ewma: the published streaming threshold; exact: "
         "bisection, as fast here and better; auto: exact",
         selections);
  sub->add_option(
         "--alpha", options->alpha,
         "Weight of each score in ewma's mean and deviation, as published; 0.02 loses less")
      ->type_name("SHARE")
      ->check(Within(0.001, 1.0))
      ->capture_default_str();
  sub->add_flag("--loose", options->loose,
                "Leave ewma's rows as the threshold has them, within half a percent of the share");
  choice("--compensate", options->compensate,
         "mean: what pruned weights added on average goes to those that stay, which needs no bias "
         "in the file; auto: mean for swift, none for the others",
         {"auto", "mean", "none"});
  sub->add_flag("--quality", options->quality,
                "Update the weights that stay by a Hessian of blocks of 64 columns: slower than "
                "scores, faster than sparsegpt");
  choice(
      "--activations", options->activations,
      "What a matrix is calibrated on. sequential: what all matrices before it leave, pruned; "
      "pruned: what its own layer leaves dense after pruned ones, at a second pass through each; "
      "dense: all dense; auto: sequential for swift, pruned for --quality and, as published, the "
      "others",
      {"auto", "sequential", "pruned", "dense"});
  sub->add_flag("--skip-first", options->skip_first,
                "Leave position 0 of each window out of the statistics");
  sub->add_option("--json", options->json, "Also write the report as JSON")->type_name("PATH");
  AddLocalModelOptions(*sub, &options->model);
  sub->get_option("--model")->required();
  sub->final_callback([=] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
