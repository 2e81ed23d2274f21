#include "tools/generation.h"

#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <limits>
#include <utility>

#include <CLI/CLI.hpp>

#include "policy/ladder_file.h"
#include "proto/request_limits.h"
#include "tools/interrupt.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

// "ID=BIAS".
bool ParseBias(const std::string& text, int32_t* id, float* bias) {
  const char* end = text.data() + text.size();
  const auto number = std::from_chars(text.data(), end, *id);
  if (number.ec != std::errc() || number.ptr == end || *number.ptr != '=') return false;
  const auto value = std::from_chars(number.ptr + 1, end, *bias);
  return value.ec == std::errc() && value.ptr == end && *id >= 0 && *bias >= -kMaxLogitBias &&
         *bias <= kMaxLogitBias;
}

std::string CheckBias(std::string& text) {
  int32_t id = 0;
  float bias = 0;
  return ParseBias(text, &id, &bias)
             ? ""
             : fmt::format("'{}' is not ID=BIAS with a token id and a bias from {} to {}", text,
                           -kMaxLogitBias, kMaxLogitBias);
}

const char* ReasonName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "unspecified";
  }
}

}  // namespace

void AddGenerationOptions(CLI::App& sub, GenerationOptions* o) {
  const auto add = [&](const char* group, const char* name, auto& value, const char* unit,
                       const CLI::Validator& check, const char* standard, const char* description) {
    sub.add_option(name, value, description)
        ->type_name(unit)
        ->check(check)
        ->default_str(standard)
        ->group(group);
  };
  constexpr int kMaxInt = std::numeric_limits<int>::max();
  const char* sampling = "Sampling";
  add(sampling, "--temperature", o->temperature, "NUMBER", Within(0, kMaxTemperature), "1",
      "Divides the logits; 0 is greedy");
  add(sampling, "--top-k", o->top_k, "TOKENS", CLI::Range(0, kMaxInt), "0",
      "Draw among the k most likely; 0: all");
  add(sampling, "--top-p", o->top_p, "PROBABILITY", AboveZero(1), "1",
      "Draw among the smallest set of likeliest tokens with this mass");
  add(sampling, "--min-p", o->min_p, "SHARE", Within(0, 1), "0",
      "Draw among tokens with at least this share of the likeliest one's probability");
  add(sampling, "--repetition-penalty", o->repetition_penalty, "NUMBER",
      AboveZero(kMaxRepetitionPenalty), "1",
      "Divides positive and multiplies negative logits of tokens seen in prompt or output");
  add(sampling, "--presence-penalty", o->presence_penalty, "LOGITS",
      Within(-kMaxPenalty, kMaxPenalty), "0", "Subtracted once from each token of the output");
  add(sampling, "--frequency-penalty", o->frequency_penalty, "LOGITS",
      Within(-kMaxPenalty, kMaxPenalty), "0",
      "Subtracted from a token of the output each time it occurred");
  sub.add_option("--logit-bias", o->logit_bias,
                 "Added to a token's logit, -100 to 100; may be given again")
      ->type_name("ID=BIAS")
      ->check(CLI::Validator(CheckBias, ""))
      ->expected(1, kMaxLogitBiases)
      ->allow_extra_args(false)
      ->group(sampling);
  sub.add_option("--seed", o->seed, "Same seed, same tokens; absent: drawn by the server")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->group(sampling);

  const char* stop = "Stopping";
  sub.add_option(
         "--max-tokens", o->max_tokens,
         "Output tokens at most; the server's default is 256 or what is left of the context")
      ->type_name("TOKENS")
      ->check(CLI::Range(1, kMaxInt, "INT in [at least 1]"))
      ->group(stop);
  sub.add_option("--min-tokens", o->min_tokens, "No end before this many output tokens")
      ->type_name("TOKENS")
      ->check(CLI::Range(0, kMaxInt, "INT in [at least 0]"))
      ->capture_default_str()
      ->group(stop);
  sub.add_option("--stop", o->stop,
                 "End before this text, 1 to 256 bytes; may be given again, at most 16 times")
      ->type_name("TEXT")
      ->check(Bytes(kMaxStopBytes))
      ->expected(1, kMaxStopStrings)
      ->allow_extra_args(false)
      ->group(stop);
  sub.add_option("--stop-id", o->stop_ids,
                 "End at this token, too; may be given again, at most 64 times")
      ->type_name("ID")
      ->check(CLI::Range(0, kMaxInt, "INT in [at least 0]"))
      ->expected(1, kMaxStopTokens)
      ->allow_extra_args(false)
      ->group(stop);
  sub.add_flag("--ignore-eos", o->ignore_eos, "The model's own end token does not end the stream")
      ->group(stop);

  const char* request = "Request";
  add(request, "--logprobs", o->logprobs, "COUNT", CLI::Range(-1, kMaxTopLogprobs), "-1",
      "Log-probability of each token, natural, and of the n most likely; -1: none");
  sub.add_option("--priority", o->priority, "Higher is served first")
      ->type_name("NUMBER")
      ->capture_default_str()
      ->group(request);
  sub.add_flag("--never-prune", o->never_prune, "Be served by the full model only")->group(request);
  sub.add_option(
         "--rung", o->rung,
         "Be served at this rung of the ladder, or the hardest milder one within the bounds; "
         "0: the full model; absent: as the server's policy says")
      ->type_name("RUNG")
      ->check(CLI::Range(0, kMostRungs - 1))
      ->group(request);
  add(request, "--max-prune-ratio", o->max_prune_ratio, "SHARE", Within(0, 1), "1",
      "Share of heads and channels that may be left out");
  sub.add_option("--max-quality-loss", o->max_quality_loss,
                 "Expected loss that may be suffered, nats per token; absent: any")
      ->type_name("NATS")
      ->check(Within(0, std::numeric_limits<double>::infinity(), "FLOAT in [at least 0]"))
      ->group(request);
}

void CheckTogether(const GenerationOptions& options) {
  if (options.max_tokens && options.min_tokens > *options.max_tokens) {
    throw CLI::ValidationError("--min-tokens",
                               fmt::format("expected at most --max-tokens = {}, got {}",
                                           *options.max_tokens, options.min_tokens));
  }
}

v1::GenerateRequest ToRequest(const GenerationOptions& o) {
  v1::GenerateRequest request;
  v1::SamplingParams& sampling = *request.mutable_sampling();
  if (o.temperature) sampling.set_temperature(*o.temperature);
  if (o.top_k) sampling.set_top_k(*o.top_k);
  if (o.top_p) sampling.set_top_p(*o.top_p);
  if (o.min_p) sampling.set_min_p(*o.min_p);
  if (o.repetition_penalty) sampling.set_repetition_penalty(*o.repetition_penalty);
  if (o.presence_penalty) sampling.set_presence_penalty(*o.presence_penalty);
  if (o.frequency_penalty) sampling.set_frequency_penalty(*o.frequency_penalty);
  for (const std::string& text : o.logit_bias) {
    int32_t id = 0;
    float bias = 0;
    if (ParseBias(text, &id, &bias)) (*sampling.mutable_logit_bias())[id] = bias;
  }
  if (o.seed) sampling.set_seed(*o.seed);

  v1::StopParams& stop = *request.mutable_stop();
  if (o.max_tokens) stop.set_max_tokens(*o.max_tokens);
  stop.set_min_tokens(o.min_tokens);
  stop.mutable_stop()->Add(o.stop.begin(), o.stop.end());
  stop.mutable_stop_token_ids()->Add(o.stop_ids.begin(), o.stop_ids.end());
  stop.set_ignore_eos(o.ignore_eos);

  if (o.logprobs >= 0) {
    request.mutable_logprobs()->set_enabled(true);
    request.mutable_logprobs()->set_top(o.logprobs);
  }
  request.set_priority(o.priority);
  if (o.never_prune) request.mutable_prune()->set_never(true);
  if (o.rung) request.mutable_prune()->set_rung(*o.rung);
  if (o.max_prune_ratio) request.mutable_prune()->set_max_prune_ratio(*o.max_prune_ratio);
  if (o.max_quality_loss) request.mutable_prune()->set_max_quality_loss(*o.max_quality_loss);
  return request;
}

absl::StatusOr<StreamResult> StreamGenerate(
    v1::EspalierService::Stub* stub, const RemoteOptions& remote,
    const v1::GenerateRequest& request,
    const std::function<void(const v1::GenerateResponse&)>& on_message) {
  using Clock = std::chrono::steady_clock;
  StreamResult result;
  StreamTimes& times = result.times;
  grpc::ClientContext context;
  Limit(remote, &context);
  const Interrupt interrupt([&context] { context.TryCancel(); });

  const Clock::time_point start = Clock::now();
  const auto elapsed = [start] {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const auto reader = stub->Generate(&context, request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
    if (response.token_ids_size() > 0) {
      times.last_token = elapsed();
      if (times.tokens == 0) times.first_token = times.last_token;
      times.tokens += response.token_ids_size();
    }
    on_message(response);
    if (response.has_finished()) result.finished = response.finished();
  }
  const absl::Status status = FromGrpc(reader->Finish());
  times.end = elapsed();
  if (!status.ok()) return status;
  return result;
}

std::string Summary(const StreamResult& result) {
  const v1::Usage& usage = result.finished.usage();
  const v1::Served& served = result.finished.served();
  std::string text = fmt::format(
      "{} prompt{} + {} new tokens, {} | TTFT {:.0f} ms, TPOT {:.1f} ms, {:.1f} tokens/s | seed "
      "{}\n"
      "served:",
      usage.prompt_tokens(),
      usage.cached_tokens() > 0 ? fmt::format(" ({} cached)", usage.cached_tokens()) : "",
      usage.completion_tokens(), ReasonName(result.finished.reason()),
      1e3 * result.times.first_token, 1e3 * result.times.per_token(), result.times.tokens_per_s(),
      result.finished.seed());
  for (const v1::RungUse& use : served.rungs()) {
    text += fmt::format(" rung {} for {} tokens,", use.rung(), use.tokens());
  }
  const v1::StageRows& rows = served.stages();
  text += fmt::format(" rows {} full, {} probed, {} by history,", rows.full(), rows.probed(),
                      rows.history());
  return text + fmt::format(" prune ratio {:.3g}, estimated loss {:.3g} nats/token, chosen by {}\n",
                            served.mean_prune_ratio(), served.estimated_loss(),
                            served.reason().empty() ? "the server" : served.reason());
}

}  // namespace espalier
