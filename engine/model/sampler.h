// Draws one token from a row of logits. Stateless: the draw for output token i depends on the
// sequence's seed and i only, so a recomputed or re-batched sequence repeats itself.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "engine/scheduling/batch.h"
#include "kernels/backend.h"

namespace espalier {

// One worker's scratch; grows to the vocabulary once.
class Sampler {
 public:
  explicit Sampler(int vocabulary);

  // What the constructor takes, to be asked before.
  static uint64_t BytesFor(int vocabulary);

  // The token for a row of Batch::logits: bias, penalties and bans in this order, then temperature,
  // top-k, top-p, min-p, one draw. `stats` are of `logits` [vocabulary], which are written to but
  // are as before when this returns. Log-probabilities are of the model's own distribution.
  // For LogitRow::kScore: the target's log-probability, nothing drawn.
  TokenResult Sample(const LogitRow& row, const LogitStatsArgs::Stats& stats,
                     std::span<float> logits);

 private:
  struct Candidate {
    float weight;  // exp((logit - max) / temperature)
    int32_t token;
  };

  void AddTop(int count, float log_sum_exp, std::span<const float> logits, TokenResult* result);
  // Writes one logit and remembers what it was.
  void Change(int32_t token, float value, std::span<float> logits);
  void ApplyPenalties(const LogitRow& row, std::span<float> logits);
  int32_t Draw(const SamplingParams& params, double uniform, std::span<const float> logits);

  std::vector<float> weights_;  // [vocabulary]
  std::vector<Candidate> candidates_;
  std::vector<std::pair<int32_t, float>> changes_;  // (token, logit before), in order
  std::vector<uint32_t> seen_;         // [vocabulary]: equals epoch_ if the token was seen
  std::vector<int32_t> output_count_;  // [vocabulary], valid where seen_ says so
  uint32_t epoch_ = 0;
};

// Uniform in [0, 1) for output token `index` of a sequence: a counter-based stream (splitmix64's
// finaliser over seed and index), so that it needs no state.
double UniformAt(uint64_t seed, uint64_t index);

}  // namespace espalier
