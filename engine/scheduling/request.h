// What a caller asked for; immutable once submitted.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "policy/policy.h"

namespace espalier {

// A point in time as a distance from an epoch that the driver picks (the server: its steady clock;
// the simulator: zero). Passed in, never read here.
using Instant = std::chrono::nanoseconds;
inline constexpr Instant kNever = Instant::max();

using RequestId = uint64_t;

// How a token is drawn from the logits. Order: logit bias, penalties, temperature, top-k, top-p,
// min-p (as llama.cpp and vLLM do), then one draw.
struct SamplingParams {
  float temperature = 1.0f;         // >= 0; 0 = greedy
  int top_k = 0;                    // 0 = off
  float top_p = 1.0f;               // (0, 1]; 1 = off
  float min_p = 0.0f;               // [0, 1]; 0 = off
  float repetition_penalty = 1.0f;  // > 0; divides positive, multiplies negative logits of tokens
                                    // seen in prompt or output; 1 = off
  float presence_penalty = 0.0f;    // [-2, 2]; subtracted once for each token of the output
  float frequency_penalty = 0.0f;   // [-2, 2]; subtracted per occurrence in the output
  std::vector<std::pair<int32_t, float>> logit_bias;  // (token, added logit)
  uint64_t seed = 0;      // the draw for output token i depends on (seed, i) only
  int top_logprobs = -1;  // -1: none; 0: of the chosen token; n: also the n most likely
};

// When a sequence ends. Stop strings are matched where text is made (server), and end the sequence
// through Cancel.
struct StopParams {
  int max_tokens = 16;  // output tokens, >= 0 (0 only with prompt_logprobs)
  int min_tokens = 0;   // no stop token is drawn before
  std::vector<int32_t>
      stop_tokens;  // end of text and the caller's; the stop token is not an output
};

struct Request {
  RequestId id = 0;             // unique among live requests
  std::vector<int32_t> prompt;  // at least one token
  SamplingParams sampling;
  StopParams stop;
  PruneBounds bounds;
  int priority = 0;  // higher is served first
  Instant arrival{0};
  Instant deadline = kNever;
  bool prompt_logprobs = false;  // also log p(prompt[i+1] | prompt[..i]): Score

  int64_t tokens() const { return static_cast<int64_t>(prompt.size()) + stop.max_tokens; }
};

}  // namespace espalier
