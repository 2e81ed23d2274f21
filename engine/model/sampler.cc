#include "engine/model/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace espalier {
namespace {

uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// exp(x) for x <= 0, relative error below 3e-7; branch-free, so that the compiler vectorises the
// loop over a vocabulary (glibc's expf is called one value at a time). Below -87, and for NaN: 0.
inline float ExpNonPositive(float x) {
  const float clamped = x >= -87.0f ? x : -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float n = (clamped * 1.44269504f + kRound) - kRound;
  float r = clamped - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.98756915e-4f;  // Cephes' minimax polynomial for exp on [-ln2/2, ln2/2]
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345203e-3f;
  p = p * r + 4.16657963e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000000e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x >= -87.0f ? p * scale : 0.0f;
}

}  // namespace

double UniformAt(uint64_t seed, uint64_t index) {
  const uint64_t bits = Mix(Mix(seed + 0x9E3779B97F4A7C15u) + index * 0x9E3779B97F4A7C15u);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

Sampler::Sampler(int vocabulary)
    : weights_(vocabulary), seen_(vocabulary, 0), output_count_(vocabulary, 0) {
  candidates_.reserve(vocabulary);
}

uint64_t Sampler::BytesFor(int vocabulary) {
  return uint64_t(vocabulary) *
         (sizeof(float) + sizeof(Candidate) + sizeof(uint32_t) + sizeof(int32_t));
}

TokenResult Sampler::Sample(const LogitRow& row, const LogitStatsArgs::Stats& stats,
                            std::span<float> logits) {
  const SamplingParams& params = *row.sampling;
  TokenResult result;
  if (params.top_logprobs > 0) AddTop(params.top_logprobs, stats.log_sum_exp, logits, &result);
  if (row.use == LogitRow::Use::kScore) {
    result.token = row.target;
    result.logprob = logits[row.target] - stats.log_sum_exp;
    return result;
  }

  const bool penalised = params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
                         params.frequency_penalty != 0.0f;
  const bool changed = penalised || !params.logit_bias.empty() || !row.banned.empty();
  if (!changed && params.temperature == 0.0f) {
    result.token = stats.argmax;
    result.logprob = stats.max - stats.log_sum_exp;
    return result;
  }

  changes_.clear();
  for (const auto& [token, bias] : params.logit_bias) {
    Change(token, logits[token] + bias, logits);
  }
  if (penalised) ApplyPenalties(row, logits);
  for (int32_t token : row.banned) {
    Change(token, -std::numeric_limits<float>::infinity(), logits);
  }
  if (params.temperature == 0.0f) {
    result.token =
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  } else {
    const uint64_t index = row.tokens.size() - row.prompt_tokens;
    result.token = Draw(params, UniformAt(params.seed, index), logits);
  }
  for (auto change = changes_.rbegin(); change != changes_.rend(); ++change) {
    logits[change->first] = change->second;
  }
  result.logprob = logits[result.token] - stats.log_sum_exp;
  return result;
}

void Sampler::Change(int32_t token, float value, std::span<float> logits) {
  changes_.emplace_back(token, logits[token]);
  logits[token] = value;
}

void Sampler::AddTop(int count, float log_sum_exp, std::span<const float> logits,
                     TokenResult* result) {
  // Insertion into a short descending list: n is at most 20 and most logits fail the first test.
  auto& top = result->top;
  top.reserve(count + 1);
  for (int32_t token = 0; token < static_cast<int32_t>(logits.size()); ++token) {
    const float logit = logits[token];
    if (static_cast<int>(top.size()) == count && !(logit > top.back().second)) continue;
    const auto place = std::find_if(top.begin(), top.end(),
                                    [&](const auto& entry) { return logit > entry.second; });
    top.insert(place, {token, logit});
    if (static_cast<int>(top.size()) > count) top.pop_back();
  }
  for (auto& [token, value] : top) value -= log_sum_exp;
}

void Sampler::ApplyPenalties(const LogitRow& row, std::span<float> logits) {
  const SamplingParams& params = *row.sampling;
  ++epoch_;
  if (epoch_ == 0) {  // wrapped: every mark would read as seen
    std::fill(seen_.begin(), seen_.end(), 0);
    epoch_ = 1;
  }
  for (size_t i = 0; i < row.tokens.size(); ++i) {
    const int32_t token = row.tokens[i];
    if (seen_[token] != epoch_) {
      seen_[token] = epoch_;
      output_count_[token] = 0;
    }
    if (static_cast<int>(i) >= row.prompt_tokens) ++output_count_[token];
  }
  for (int32_t token : row.tokens) {
    if (seen_[token] != epoch_) continue;  // done already
    seen_[token] = 0;
    float logit = logits[token];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    const int count = output_count_[token];
    logit -= params.frequency_penalty * count + (count > 0 ? params.presence_penalty : 0.0f);
    Change(token, logit, logits);
  }
}

int32_t Sampler::Draw(const SamplingParams& params, double uniform, std::span<const float> logits) {
  const size_t size = logits.size();
  const auto largest = std::max_element(logits.begin(), logits.end());
  const float max = *largest;
  // What is drawn if nothing has weight: a model may overflow to infinities and NaN.
  const auto likeliest = static_cast<int32_t>(largest - logits.begin());
  // Finite for the smallest temperatures too: 0 times infinity would leave the likeliest no weight.
  const float inverse_temperature =
      std::min(1.0f / params.temperature, std::numeric_limits<float>::max());
  for (size_t i = 0; i < size; ++i) {
    weights_[i] = ExpNonPositive((logits[i] - max) * inverse_temperature);
  }
  double mass = 0;
  for (size_t i = 0; i < size; ++i) mass += weights_[i];

  const bool narrowed = (params.top_k > 0 && params.top_k < static_cast<int>(size)) ||
                        params.top_p < 1.0f || params.min_p > 0.0f;
  if (!narrowed) {
    double left = uniform * mass;
    int32_t last = likeliest;
    for (size_t i = 0; i < size; ++i) {
      if (weights_[i] == 0) continue;
      last = static_cast<int32_t>(i);
      left -= weights_[i];
      if (left < 0) break;
    }
    return last;
  }

  // Likeliest first; the lower token id wins a tie, so that the order is total.
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  };
  candidates_.clear();
  double total = mass;
  if (params.top_k > 0 && params.top_k < static_cast<int>(size)) {
    // A heap of the k likeliest, the least likely in front: most tokens fail the first comparison.
    for (size_t i = 0; i < size; ++i) {
      if (weights_[i] == 0) continue;
      const Candidate candidate{weights_[i], static_cast<int32_t>(i)};
      if (static_cast<int>(candidates_.size()) == params.top_k) {
        if (!likelier(candidate, candidates_.front())) continue;
        std::pop_heap(candidates_.begin(), candidates_.end(), likelier);
        candidates_.pop_back();
      }
      candidates_.push_back(candidate);
      std::push_heap(candidates_.begin(), candidates_.end(), likelier);
    }
    total = 0;
    for (const Candidate& candidate : candidates_) total += candidate.weight;
  } else {
    // Tokens below this weight hold at most 1 - top_p of the mass together, so none of them is in
    // the nucleus; none below min_p survives either (the likeliest has weight 1).
    const float floor = std::max(
        static_cast<float>((1.0 - params.top_p) * mass / static_cast<double>(size)), params.min_p);
    for (size_t i = 0; i < size; ++i) {
      if (weights_[i] >= floor && weights_[i] > 0) {
        candidates_.push_back({weights_[i], static_cast<int32_t>(i)});
      }
    }
  }
  if (candidates_.empty()) return likeliest;
  std::sort(candidates_.begin(), candidates_.end(), likelier);
  if (params.top_p < 1.0f) {
    double covered = 0;
    size_t keep = 0;
    while (keep < candidates_.size() && covered < params.top_p * total) {
      covered += candidates_[keep++].weight;
    }
    candidates_.resize(std::max<size_t>(keep, 1));
  }
  while (candidates_.size() > 1 && candidates_.back().weight < params.min_p) {
    candidates_.pop_back();
  }
  double kept = 0;
  for (const Candidate& candidate : candidates_) kept += candidate.weight;
  double left = uniform * kept;
  for (const Candidate& candidate : candidates_) {
    left -= candidate.weight;
    if (left < 0) return candidate.token;
  }
  return candidates_.back().token;
}

}  // namespace espalier
