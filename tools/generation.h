// One streamed answer: the options that shape it, the call, and what it took.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "espalier/v1/espalier.grpc.pb.h"
#include "tools/remote.h"

namespace CLI {
class App;
}

namespace espalier {

// Sampling, stop, log-probability, priority and pruning options. What is absent is the server's
// default.
struct GenerationOptions {
  std::optional<float> temperature;
  std::optional<int> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::vector<std::string> logit_bias;  // "ID=BIAS"
  std::optional<uint64_t> seed;
  std::optional<int> max_tokens;
  int min_tokens = 0;
  std::vector<std::string> stop;
  std::vector<int> stop_ids;
  bool ignore_eos = false;
  int logprobs = -1;
  int priority = 0;
  bool never_prune = false;
  std::optional<int> rung;
  std::optional<float> max_prune_ratio;
  std::optional<float> max_quality_loss;
};

void AddGenerationOptions(CLI::App& sub, GenerationOptions* options);

// Throws CLI11's error for options that are right by themselves but contradict each other; for a
// final_callback.
void CheckTogether(const GenerationOptions& options);

// Everything but the prompt and the model's name.
v1::GenerateRequest ToRequest(const GenerationOptions& options);

// A stream as this end saw it; times in seconds from the call.
struct StreamTimes {
  double first_token = 0;
  double last_token = 0;
  double end = 0;
  int tokens = 0;

  // Seconds per token after the first; 0 for fewer than two.
  double per_token() const { return tokens > 1 ? (last_token - first_token) / (tokens - 1) : 0; }
  double tokens_per_s() const { return end > 0 ? tokens / end : 0; }
};

struct StreamResult {
  StreamTimes times;
  v1::Finished finished;
};

// Calls and hands over every message as it comes. Ctrl-C cancels the call.
absl::StatusOr<StreamResult> StreamGenerate(
    v1::EspalierService::Stub* stub, const RemoteOptions& remote,
    const v1::GenerateRequest& request,
    const std::function<void(const v1::GenerateResponse&)>& on_message);

// Two lines: tokens, finish reason and times; how it was served.
std::string Summary(const StreamResult& result);

}  // namespace espalier
