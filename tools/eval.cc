// `espalier eval`: what each rung of a ladder loses on texts, and what time it takes, with prefill,
// paged KV and decode steps as a server runs them.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/model/model_probe.h"
#include "engine/model/pruning_file.h"
#include "engine/model/text/tokenizer.h"
#include "engine/pruning/probe.h"
#include "policy/ladder_file.h"
#include "tools/command.h"
#include "tools/corpus.h"
#include "tools/forced_run.h"
#include "tools/interrupt.h"
#include "tools/local_model.h"
#include "tools/progress.h"
#include "tools/scatter.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

struct Options {
  LocalModelOptions model;
  std::string ladder;
  std::vector<int> rungs;
  std::vector<std::string> texts;
  int prompt = 256;
  int decode = 128;
  int batch = 8;
  int count = 32;
  int step_rows = 512;
  std::string probe = "off";
  ProbeOptions probing;
  bool exact = false;
  std::vector<std::string> history;
  int history_tokens = 100'000;
  bool mixed = false;
  bool json = false;
  std::string plot;
};

// Tokens of a text; the last is predicted by the last decode row, and is none itself.
int TextLength(const Options& options) {
  return options.prompt + options.decode + (options.decode > 0 ? 1 : 0);
}

struct Text {
  std::string kind;
  std::vector<int32_t> tokens;
};

// Kinds in turns, so that each batch has as many of them as it can.
absl::StatusOr<std::vector<Text>> ReadTexts(const Options& options, const Tokenizer& tokenizer) {
  const int kinds = static_cast<int>(options.texts.size());
  const int length = TextLength(options);
  absl::StatusOr<std::vector<TextKind>> read =
      ReadKinds(options.texts, tokenizer, length, (options.count + kinds - 1) / kinds);
  if (!read.ok()) return read.status();
  std::vector<Text> texts;
  for (size_t i = 0; static_cast<int>(texts.size()) < options.count; ++i) {
    const size_t before = texts.size();
    for (TextKind& kind : *read) {
      if (i >= kind.windows.size() || static_cast<int>(texts.size()) == options.count) continue;
      texts.push_back({kind.name, std::move(kind.windows[i])});
    }
    if (texts.size() == before) break;
  }
  return texts;
}

// What a rung made of the texts.
struct RungResult {
  std::vector<double> loss;  // [texts], nats per token
  double prefill_s = 0, decode_s = 0, probe_s = 0;
  int64_t prefill_rows = 0, decode_rows = 0, terms = 0;
};

// [rungs]. Mixed: every batch holds all rungs, and each text is on each of them in one of its
// turns.
absl::StatusOr<std::vector<RungResult>> Measure(const Options& options,
                                                const std::vector<Text>& texts,
                                                ModelExecutor* executor) {
  std::vector<RungResult> results(options.rungs.size());
  for (RungResult& result : results) result.loss.resize(texts.size());
  const size_t turns = options.rungs.size();
  Progress bar("evaluating");
  for (size_t turn = 0; turn < turns; ++turn) {
    for (size_t begin = 0; begin < texts.size(); begin += options.batch) {
      if (Interrupt::raised()) return absl::CancelledError("interrupted");
      const size_t end = std::min(texts.size(), begin + options.batch);
      const auto rung_of = [&](size_t text) {
        return options.mixed ? (turn + text) % turns : turn;
      };
      std::vector<ForcedText> forced;
      for (size_t i = begin; i < end; ++i) {
        forced.push_back({.tokens = texts[i].tokens,
                          .prompt = options.prompt,
                          .rung = options.rungs[rung_of(i)]});
      }
      const absl::StatusOr<ForcedResult> run = RunForced(executor, options.step_rows, forced);
      if (!run.ok()) return run.status();
      for (size_t i = begin; i < end; ++i) {
        RungResult& result = results[rung_of(i)];
        result.loss[i] = run->nll[i - begin] / run->terms[i - begin];
        result.terms += run->terms[i - begin];
      }
      RungResult& result = results[turn];
      result.prefill_s += run->prefill_s;
      result.decode_s += run->decode_s;
      result.probe_s += run->probe_s;
      result.prefill_rows += run->prefill_rows;
      result.decode_rows += run->decode_rows;
      bar.Update(static_cast<int64_t>(turn * texts.size() + end),
                 static_cast<int64_t>(turns * texts.size()));
    }
  }
  return results;
}

struct Mean {
  double value = 0, error = 0;  // standard error of the mean
};

Mean MeanOf(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {mean, values.size() > 1 ? std::sqrt(squares / (n - 1) / n) : 0};
}

nlohmann::ordered_json Report(const Options& options, const std::vector<Text>& texts,
                              const Ladder& ladder, const std::vector<RungResult>& results) {
  nlohmann::ordered_json report = {
      {"prompt", options.prompt},         {"decode", options.decode},
      {"batch", options.batch},           {"mixed", options.mixed},
      {"texts", nlohmann::json::array()}, {"rungs", nlohmann::json::array()}};
  for (size_t i = 0; i < texts.size(); ++i) {
    nlohmann::ordered_json losses = nlohmann::json::array();
    for (const RungResult& result : results) losses.push_back(result.loss[i]);
    report["texts"].push_back(
        {{"kind", texts[i].kind}, {"tokens", texts[i].tokens}, {"loss", losses}});
  }
  for (size_t r = 0; r < results.size(); ++r) {
    const RungResult& result = results[r];
    const Rung& rung = ladder.rung(options.rungs[r]);
    std::vector<double> above;
    std::map<std::string, std::vector<double>> by_kind;
    for (size_t i = 0; i < texts.size(); ++i) {
      above.push_back(result.loss[i] - results[0].loss[i]);
      by_kind[texts[i].kind].push_back(above.back());
    }
    const Mean loss = MeanOf(above);
    nlohmann::ordered_json kinds;
    for (const auto& [kind, values] : by_kind) kinds[kind] = MeanOf(values).value;
    report["rungs"].push_back(
        {{"rung", options.rungs[r]},
         {"prune_ratio", rung.decode.prune_ratio()},
         {"loss", MeanOf(result.loss).value},
         {"above_first", loss.value},
         {"standard_error", loss.error},
         {"told",
          rung.price.quality_loss_nats - ladder.rung(options.rungs[0]).price.quality_loss_nats},
         {"terms", result.terms},
         {"prefill_tokens_per_s",
          result.prefill_s > 0 ? static_cast<double>(result.prefill_rows) / result.prefill_s : 0},
         {"decode_tokens_per_s",
          result.decode_s > 0 ? static_cast<double>(result.decode_rows) / result.decode_s : 0},
         {"prefill_s", result.prefill_s},
         {"decode_s", result.decode_s},
         {"probe_s", result.probe_s},
         {"seconds", result.prefill_s + result.decode_s},
         {"above_first_by_kind", kinds}});
  }
  return report;
}

void Print(const Options& options, const nlohmann::ordered_json& report) {
  fmt::print(
      "{} texts, prompt {}, {} decode rows each, batch {}{}; loss in nats/token, above rung "
      "{}\n\n",
      report["texts"].size(), options.prompt, options.decode, options.batch,
      options.mixed ? ", rungs mixed in each batch" : "", options.rungs[0]);
  fmt::print("{:>4} {:>7} {:>8} {:>18} {:>7} {:>9} {:>9} {:>7}   by kind\n", "rung", "pruned",
             "loss", "above", "told", "prefill/s", "decode/s", "PRR");
  const auto& first = report["rungs"][0];
  for (const auto& rung : report["rungs"]) {
    // Probe Pruning's performance runtime ratio: perplexity lost per second saved.
    const double lost =
        std::exp(rung["loss"].get<double>()) - std::exp(first["loss"].get<double>());
    const double saved = first["seconds"].get<double>() - rung["seconds"].get<double>();
    const bool timed = !options.mixed && saved > 0.02 * first["seconds"].get<double>();
    std::string kinds;
    for (const auto& [kind, value] : rung["above_first_by_kind"].items()) {
      kinds += fmt::format(" {} {:.2f}", kind, value.get<double>());
    }
    fmt::print(
        "{:>4} {:>6.1f}% {:>8.4f} {:>8.4f} +- {:>6.4f} {:>7.3f} {:>9.0f} {:>9.0f} {:>7}  {}\n",
        rung["rung"].get<int>(), 100 * rung["prune_ratio"].get<double>(),
        rung["loss"].get<double>(), rung["above_first"].get<double>(),
        rung["standard_error"].get<double>(), rung["told"].get<double>(),
        rung["prefill_tokens_per_s"].get<double>(), rung["decode_tokens_per_s"].get<double>(),
        timed ? fmt::format("{:.2f}", lost / saved) : "-", kinds);
  }
  fmt::print("\nPRR: perplexity lost per second saved of these runs, {:.2f} s at rung {}\n",
             first["seconds"].get<double>(), options.rungs[0]);
}

// Loss above the first rung over time to it.
absl::Status Plot(const std::string& path, const nlohmann::ordered_json& report) {
  std::vector<ScatterPoint> points;
  const double first = report["rungs"][0]["seconds"].get<double>();
  for (const auto& rung : report["rungs"]) {
    points.push_back({.x = first > 0 ? rung["seconds"].get<double>() / first : 0,
                      .y = rung["above_first"].get<double>(),
                      .error = rung["standard_error"].get<double>(),
                      .told = rung["told"].get<double>(),
                      .label = fmt::format("rung {}", rung["rung"].get<int>())});
  }
  std::ofstream file(path);
  file << ScatterSvg(
      points, "What rungs lose and save (hollow: told)",
      fmt::format("time, of rung {}'s", report["rungs"][0]["rung"].get<int>()),
      fmt::format("nats/token above rung {}", report["rungs"][0]["rung"].get<int>()));
  file.close();
  return file ? absl::OkStatus()
              : absl::UnavailableError(fmt::format("--plot: {}: cannot be written", path));
}

// A probe with the history of the texts asked for.
absl::StatusOr<std::unique_ptr<Probe>> LearnedProbe(const Options& options, const ModelFile& file,
                                                    const Tokenizer& tokenizer,
                                                    ModelExecutor* executor) {
  // As long as what is evaluated, so that positions are those that the history knows.
  const int window = std::min(options.prompt, options.step_rows);
  SiteHistories histories(file.config(), options.exact ? options.prompt : 0);
  ProbeOptions probing = options.probing;
  probing.rows = static_cast<ProbeOptions::Rows>(std::ranges::find(kProbeNames, options.probe) -
                                                 std::begin(kProbeNames) - 1);
  probing.group = executor->channel_group();
  if (options.history.empty() || probing.rows == ProbeOptions::Rows::kAll) {
    probing.fuse = false;
  } else {
    const auto kinds = static_cast<int>(options.history.size());
    absl::StatusOr<std::vector<TextKind>> texts = ReadKinds(
        options.history, tokenizer, window, std::max(1, options.history_tokens / window / kinds));
    if (!texts.ok()) return texts.status();
    std::vector<int> positions(window);
    std::iota(positions.begin(), positions.end(), 0);
    executor->set_channel_observer(
        [&](int layer, ConstMatrix rows) { histories.channels.Learn(layer, rows, positions); });
    executor->set_input_observer([&](int layer, MatrixInput input, ConstMatrix rows) {
      if (input == MatrixInput::kO) histories.heads.Learn(layer, rows, positions);
    });
    Progress bar("history");
    int64_t done = 0, all = 0;
    for (const TextKind& kind : *texts) all += static_cast<int64_t>(kind.windows.size());
    for (const TextKind& kind : *texts) {
      for (const std::vector<int32_t>& tokens : kind.windows) {
        const ForcedText text{.tokens = tokens, .prompt = window, .scored = false};
        const absl::Status status = RunForced(executor, options.step_rows, {&text, 1}).status();
        if (!status.ok()) return status;
        if (Interrupt::raised()) return absl::CancelledError("interrupted");
        bar.Update(++done, all);
      }
    }
    executor->set_channel_observer({});
    executor->set_input_observer({});
  }
  return MakeProbe(probing, file, std::move(histories));
}

absl::Status Run(Options options) {
  const Interrupt interrupt([] {});
  const int length = TextLength(options);
  if (length < 2) return absl::InvalidArgumentError("--prompt: one token predicts none");
  absl::StatusOr<LocalModel> model =
      LoadLocalModel(options.model, options.batch * PagedTokens(length), options.step_rows);
  if (!model.ok()) return model.status();
  if (length > model->file->config().context) {
    return absl::InvalidArgumentError(
        fmt::format("--prompt, --decode: {} tokens, and the model's context is {}", length,
                    model->file->config().context));
  }
  auto tokenizer = Tokenizer::Create(model->file->vocabulary());
  if (!tokenizer.ok()) return tokenizer.status();
  absl::StatusOr<CalibratedLadder> ladder = OpenLadder(
      options.ladder.empty() ? LadderPathOf(options.model.model) : options.ladder, *model->file);
  if (!ladder.ok()) return ladder.status();
  absl::Status status = model->executor->SetLadder(ladder->ladder, *ladder->channels);
  if (!status.ok()) return status;
  if (options.rungs.empty()) {
    options.rungs.resize(ladder->ladder.size());
    std::iota(options.rungs.begin(), options.rungs.end(), 0);
  }
  for (const int rung : options.rungs) {
    if (rung >= ladder->ladder.size()) {
      return absl::InvalidArgumentError(fmt::format("--rungs: {}, and the ladder has rungs 0 to {}",
                                                    rung, ladder->ladder.size() - 1));
    }
  }
  absl::StatusOr<std::vector<Text>> texts = ReadTexts(options, **tokenizer);
  if (!texts.ok()) return texts.status();
  std::unique_ptr<Probe> probe;
  if (options.probe != "off") {
    absl::StatusOr<std::unique_ptr<Probe>> made =
        LearnedProbe(options, *model->file, **tokenizer, model->executor.get());
    if (!made.ok()) return made.status();
    probe = *std::move(made);
    model->executor->set_probe(probe.get());
  }
  const absl::StatusOr<std::vector<RungResult>> results =
      Measure(options, *texts, model->executor.get());
  if (!results.ok()) return results.status();
  const nlohmann::ordered_json report = Report(options, *texts, ladder->ladder, *results);
  if (options.json) {
    fmt::print("{}\n", report.dump());
  } else {
    Print(options, report);
  }
  return options.plot.empty() ? absl::OkStatus() : Plot(options.plot, report);
}

}  // namespace

void AddEval(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "eval", "Measure what each rung of a ladder loses on texts, and what time it takes");
  const auto number = [&](const char* name, int& value, const char* unit, const char* meaning,
                          int low, int high) {
    sub->add_option(name, value, meaning)
        ->type_name(unit)
        ->check(CLI::Range(low, high))
        ->capture_default_str();
  };
  sub->add_option("--ladder", options->ladder,
                  "What `espalier calibrate` wrote, with its channels beside it. Default: beside "
                  "the model")
      ->type_name("PATH");
  sub->add_option("--rungs", options->rungs,
                  "Rungs to measure; losses are told above the first. Default: all")
      ->type_name("RUNG")
      ->delimiter(',')
      ->check(CLI::Range(0, kMostRungs - 1));
  sub->add_option("--text", options->texts, "Files or folders, each of which is a kind of text")
      ->type_name("PATH")
      ->required();
  number("--prompt", options->prompt, "TOKENS", "Tokens of a text that are prefilled", 1, 1 << 20);
  number("--decode", options->decode, "TOKENS",
         "Decode steps of a text, each of which is scored; 0: all of the prompt is", 0, 1 << 20);
  number("--batch", options->batch, "COUNT", "Texts that run together", 1, 4096);
  number("--count", options->count, "COUNT", "Texts, of all kinds", 1, 1 << 20);
  number("--step-rows", options->step_rows, "COUNT", "Rows of a step", 1, 65536);
  const char* probing =
      "Probe Pruning: heads and channels chosen anew in each step with prefill rows";
  sub->add_option("--probe", options->probe,
                  "Which rows look ahead; top-norm: the published rule; spread: evenly; "
                  "all: the upper bound, with no history; prompts: none do, and what the prompts "
                  "last read held ranks for decode")
      ->type_name("NAME")
      ->check(
          CLI::IsMember(std::vector<std::string>(std::begin(kProbeNames), std::end(kProbeNames))))
      ->capture_default_str()
      ->group(probing);
  const auto share = [&](const char* name, double& value, const char* meaning) {
    sub->add_option(name, value, meaning)
        ->type_name("SHARE")
        ->check(Within(0, 1))
        ->capture_default_str()
        ->group(probing);
  };
  share("--probe-tokens", options->probing.token_share, "Of positions; top-norm");
  share("--probe-sequences", options->probing.sequence_share, "Of sequences; top-norm");
  share("--probe-budget", options->probing.budget,
        "Most rows probed, of those narrowed, one at least; a server's default is 0.015");
  sub->add_flag("--probe-stale", options->probing.stale,
                "Probe rows as they were before the layer's attention (published as parallel "
                "probing, which waits for nothing)")
      ->group(probing);
  share("--history-keep", options->probing.keep, "Of history at an update; 1: frozen");
  const auto every = [&](const char* name, int& value, const char* meaning) {
    sub->add_option(name, value, meaning)
        ->type_name("STEPS")
        ->check(CLI::Range(0, 1'000'000))
        ->capture_default_str()
        ->group(probing);
  };
  every("--probe-refresh", options->probing.refresh,
        "Decode steps after which history ranks anew; 0: never");
  every("--probe-whole", options->probing.whole,
        "Of so many decode steps one leaves nothing out; 0: none");
  sub->add_option("--history-text", options->history,
                  "Files or folders that history is learned from before; without: no history")
      ->type_name("PATH")
      ->group(probing);
  sub->add_option("--history-tokens", options->history_tokens, "Tokens of it")
      ->type_name("TOKENS")
      ->check(CLI::Range(1, 100'000'000))
      ->capture_default_str()
      ->group(probing);
  sub->add_flag("--exact-history", options->exact,
                "A mean for each position of a prompt, as published, in place of seven buckets")
      ->group(probing);
  CLI::Option* const mixed =
      sub->add_flag("--mixed", options->mixed, "Rungs side by side in each batch");
  sub->add_option("--plot", options->plot, "Draw loss over time there, as SVG")
      ->type_name("PATH")
      ->excludes(mixed);
  sub->add_flag("--json", options->json, "Print one JSON object, with each text's tokens and loss");
  AddLocalModelOptions(*sub, &options->model);
  sub->get_option("--model")->required();
  sub->final_callback([=] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
