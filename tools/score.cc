// `espalier score`: log-probability and perplexity of a text, by a server or by a model loaded
// here.
#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/engine.h"
#include "engine/model/text/tokenizer.h"
#include "policy/policy.h"
#include "tools/command.h"
#include "tools/local_model.h"
#include "tools/perplexity.h"
#include "tools/progress.h"
#include "tools/remote.h"
#include "tools/text_input.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  LocalModelOptions model;
  TextInput input;
  bool token_ids = false;
  bool special = false;
  int window = 1024;
  int windows = 0;
  int stride = 0;
  int step_rows = 512;
  std::optional<double> reference_ppl;
  double tolerance = 1e-4;
  bool json = false;
};

// A text's tokens and who scores them.
struct Subject {
  std::vector<int32_t> tokens;
  WindowScorer score;
};

// One request at a time through an engine of its own, so that each window starts from an empty
// cache.
absl::StatusOr<double> ScoreHere(Engine* engine, std::span<const int32_t> window, int first) {
  Request request;
  request.id = 1;
  request.prompt.assign(window.begin(), window.end());
  request.stop.max_tokens = 0;
  request.sampling.top_logprobs = 0;
  request.prompt_logprobs = true;
  absl::Status status = engine->Submit(std::move(request));
  if (!status.ok()) return status;
  double logprob = 0;
  int scored = 0;
  while (!engine->idle()) {
    const absl::StatusOr<const StepReport*> report = engine->Step(Instant{0});
    if (!report.ok()) return report.status();
    for (const SequenceOutput& output : (*report)->outputs) {
      for (const TokenResult& token : output.prompt_scores) {
        if (++scored >= first) logprob += token.logprob;
      }
    }
  }
  if (scored + 1 != static_cast<int>(window.size())) {
    return absl::InternalError(
        fmt::format("{} tokens of {} were scored", scored, window.size() - 1));
  }
  return logprob;
}

// "1 22 333".
absl::StatusOr<std::vector<int32_t>> ParseIds(std::string_view text) {
  std::vector<int32_t> ids;
  const auto blank = [](char c) { return c == ' ' || c == '\n' || c == '\t' || c == ','; };
  for (const char *at = text.data(), *end = at + text.size(); at != end;) {
    if (blank(*at)) {
      ++at;
      continue;
    }
    int32_t id = 0;
    const auto [next, error] = std::from_chars(at, end, id);
    if (error != std::errc() || id < 0 || (next != end && !blank(*next))) {
      return absl::InvalidArgumentError(
          fmt::format("byte {}: expected a token id", at - text.data()));
    }
    ids.push_back(id);
    at = next;
  }
  return ids;
}

struct LocalScorer {
  LocalModel model;
  FixedPolicy policy{0};
  std::optional<Engine> engine;
};

absl::StatusOr<Subject> Local(const Options& options, const std::string& text) {
  // The tokenizer first: whether the text is long enough is known before anything is loaded.
  absl::StatusOr<std::unique_ptr<ModelFile>> file = ModelFile::Open(options.model.model);
  if (!file.ok()) return file.status();
  absl::StatusOr<std::vector<int32_t>> tokens;
  if (options.token_ids) {
    tokens = ParseIds(text);
  } else {
    auto tokenizer = Tokenizer::Create((*file)->vocabulary());
    if (!tokenizer.ok()) return tokenizer.status();
    tokens = EncodeText(**tokenizer, text, options.special);
  }
  if (!tokens.ok()) return tokens.status();
  for (const int32_t id : *tokens) {
    if (id >= (*file)->config().vocabulary) {
      return absl::InvalidArgumentError(fmt::format("token id {}: the vocabulary has {} tokens", id,
                                                    (*file)->config().vocabulary));
    }
  }
  absl::StatusOr<WindowPlan> plan = PlanWindows(static_cast<int64_t>(tokens->size()),
                                                options.window, options.windows, options.stride);
  if (!plan.ok()) return plan.status();

  absl::StatusOr<LocalModel> model =
      LoadLocalModel(options.model, PagedTokens(plan->tokens + 1), options.step_rows);
  if (!model.ok()) return model.status();
  auto scorer = std::make_shared<LocalScorer>();
  scorer->model = *std::move(model);
  ModelExecutor* executor = scorer->model.executor.get();
  scorer->engine.emplace(
      SchedulerOptions{.max_batch_tokens = options.step_rows, .max_sequences = 1},
      executor->kv_geometry(), executor->ladder(), executor, &scorer->policy);
  return Subject{*std::move(tokens), [scorer](std::span<const int32_t> window, int first) {
                   return ScoreHere(&*scorer->engine, window, first);
                 }};
}

absl::StatusOr<std::vector<int32_t>> TokenizeThere(const Options& options,
                                                   const std::string& text) {
  v1::TokenizeRequest request;
  request.set_model(options.remote.model_name);
  request.set_text(text);
  request.set_parse_special(options.special);
  v1::TokenizeResponse response;
  const absl::Status status =
      UnaryCall(options.remote, &v1::EspalierService::Stub::Tokenize, request, &response);
  if (!status.ok()) return status;
  return std::vector<int32_t>(response.token_ids().begin(), response.token_ids().end());
}

absl::StatusOr<Subject> Remote(const Options& options, const std::string& text) {
  absl::StatusOr<std::vector<int32_t>> tokens =
      options.token_ids ? ParseIds(text) : TokenizeThere(options, text);
  if (!tokens.ok()) return tokens.status();
  return Subject{*std::move(tokens),
                 [&options](std::span<const int32_t> window, int first) -> absl::StatusOr<double> {
                   v1::ScoreRequest score;
                   score.set_model(options.remote.model_name);
                   score.mutable_token_ids()->mutable_ids()->Add(window.begin(), window.end());
                   v1::ScoreResponse scored;
                   const absl::Status called =
                       UnaryCall(options.remote, &v1::EspalierService::Stub::Score, score, &scored);
                   if (!called.ok()) return called;
                   if (first == 1) return scored.total_logprob();
                   double logprob = 0;
                   for (int i = first - 1; i < scored.logprobs_size(); ++i) {
                     logprob += scored.logprobs(i).logprob();
                   }
                   return logprob;
                 }};
}

void Print(const PerplexityResult& result, const WindowPlan& plan, bool json) {
  if (json) {
    fmt::print("{}\n", nlohmann::ordered_json{{"windows", plan.windows},
                                              {"window_tokens", plan.tokens},
                                              {"stride", plan.stride},
                                              {"terms", result.terms},
                                              {"nll", result.nll},
                                              {"mean_nll", result.mean()},
                                              {"ppl", result.perplexity()},
                                              {"nll_per_window", result.nll_per_window}}
                           .dump());
    return;
  }
  if (plan.windows > 1) {
    for (size_t w = 0; w < result.nll_per_window.size(); ++w) {
      fmt::print("window {:>4}: NLL {:.3f}\n", w, result.nll_per_window[w]);
    }
  }
  fmt::print(
      "{} windows of {} tokens{}, {} terms: NLL {:.3f}, mean {:.6f} nats/token, PPL {:.5f}\n",
      plan.windows, plan.tokens,
      plan.stride < plan.tokens ? fmt::format(", one every {}", plan.stride) : "", result.terms,
      result.nll, result.mean(), result.perplexity());
}

absl::Status Run(const Options& options, bool local) {
  absl::StatusOr<std::string> text = ReadText(options.input);
  if (!text.ok()) return text.status();
  absl::StatusOr<Subject> subject = local ? Local(options, *text) : Remote(options, *text);
  if (!subject.ok()) return subject.status();
  absl::StatusOr<WindowPlan> plan = PlanWindows(static_cast<int64_t>(subject->tokens.size()),
                                                options.window, options.windows, options.stride);
  if (!plan.ok()) return plan.status();

  absl::StatusOr<PerplexityResult> result;
  {
    Progress bar("scoring");
    result = MeasurePerplexity(subject->tokens, *plan, subject->score,
                               [&](int done, int total) { bar.Update(done, total); });
  }
  if (!result.ok()) return result.status();
  Print(*result, *plan, options.json);
  if (options.reference_ppl &&
      !WithinTolerance(result->perplexity(), *options.reference_ppl, options.tolerance)) {
    return absl::OutOfRangeError(fmt::format(
        "PPL {:.5f} is off the reference {:.5f} by {:+.4f} %, more than {:.4f} %",
        result->perplexity(), *options.reference_ppl,
        100 * (result->perplexity() / *options.reference_ppl - 1), 100 * options.tolerance));
  }
  return absl::OkStatus();
}

}  // namespace

void AddScore(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "score", "Print the log-probability and perplexity of a text, by a server or by --model");
  AddTextInput(*sub, &options->input);
  CLI::Option* ids = sub->add_flag("--token-ids", options->token_ids,
                                   "The text is token ids, separated by blanks or commas");
  sub->add_flag("--special", options->special,
                "Strings of special tokens in the text become their tokens")
      ->excludes(ids);
  sub->add_option("--window", options->window,
                  "The text is cut into windows of this length, each scored from an empty cache "
                  "over its tokens but the first; a shorter text is one window")
      ->type_name("TOKENS")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  sub->add_option("--windows", options->windows,
                  "How many windows to score; 0: all that the text fills")
      ->type_name("COUNT")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  sub->add_option("--stride", options->stride,
                  "From one window to the next. Less than --window: they overlap, and all but the "
                  "first are scored over their last so many tokens; 0: they do not")
      ->type_name("TOKENS")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  CLI::Option* reference =
      sub->add_option("--reference-ppl", options->reference_ppl,
                      "Fail (exit code 1) if the perplexity is further from this than --tolerance")
          ->type_name("PPL")
          ->check(AboveZero(std::numeric_limits<float>::max()));
  sub->add_option("--tolerance", options->tolerance, "Relative to --reference-ppl")
      ->type_name("SHARE")
      ->check(Within(0, 1))
      ->capture_default_str()
      ->needs(reference);
  sub->add_flag("--json", options->json, "Print one JSON object");
  AddLocalModelOptions(*sub, &options->model);
  sub->add_option("--step-rows", options->step_rows, "Token budget of a step")
      ->type_name("TOKENS")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str()
      ->group("Model in this process");
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([=] {
    const bool local = IsLocal(sub->get_option("--model"), sub->get_option("--address"));
    *action = [options, local] { return Run(*options, local); };
  });
}

}  // namespace espalier
