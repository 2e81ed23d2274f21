#include "engine/model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

LogitStatsArgs::Stats StatsOf(const std::vector<float>& logits) {
  LogitStatsArgs::Stats stats{.max = logits[0], .argmax = 0};
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > stats.max) stats = {.max = logits[i], .argmax = static_cast<int32_t>(i)};
    sum += std::exp(static_cast<double>(logits[i]));
  }
  stats.log_sum_exp = static_cast<float>(std::log(sum));
  return stats;
}

class SamplerTest : public ::testing::Test {
 protected:
  TokenResult Sample() {
    row_.sampling = &params_;
    row_.tokens = tokens_;
    row_.prompt_tokens = prompt_tokens_;
    row_.banned = banned_;
    Sampler sampler(static_cast<int>(logits_.size()));
    std::vector<float> copy = logits_;
    const TokenResult result = sampler.Sample(row_, StatsOf(logits_), copy);
    EXPECT_EQ(copy, logits_) << "logits are as before when Sample returns";
    return result;
  }

  // How often each token is drawn over output positions 0 .. draws - 1.
  std::map<int32_t, double> Frequencies(int draws) {
    std::map<int32_t, double> share;
    prompt_tokens_ = 0;
    Sampler sampler(static_cast<int>(logits_.size()));
    const LogitStatsArgs::Stats stats = StatsOf(logits_);
    std::vector<int32_t> history(draws, 0);
    for (int i = 0; i < draws; ++i) {
      row_.sampling = &params_;
      row_.tokens = std::span(history).first(i);
      row_.prompt_tokens = 0;
      ++share[sampler.Sample(row_, stats, logits_).token];
    }
    for (auto& [token, count] : share) count /= draws;
    return share;
  }

  LogitRow row_;
  SamplingParams params_;
  std::vector<float> logits_ = {0.0f, 1.0f, 3.0f, 2.0f, -1.0f};
  std::vector<int32_t> tokens_ = {0};
  std::vector<int32_t> banned_;
  int prompt_tokens_ = 1;
};

TEST_F(SamplerTest, GreedyTakesTheLargestAndTellsItsLogprob) {
  params_.temperature = 0;
  const TokenResult result = Sample();
  EXPECT_EQ(result.token, 2);
  EXPECT_NEAR(result.logprob, 3.0 - StatsOf(logits_).log_sum_exp, 1e-6);
}

TEST_F(SamplerTest, FrequenciesFollowTheSoftmaxAtATemperature) {
  for (float temperature : {0.5f, 1.0f, 2.0f}) {
    params_.temperature = temperature;
    params_.seed = 7;
    double mass = 0;
    for (float logit : logits_) mass += std::exp(logit / temperature);
    const auto share = Frequencies(40000);
    for (size_t i = 0; i < logits_.size(); ++i) {
      const double expected = std::exp(logits_[i] / temperature) / mass;
      const auto found = share.find(i);
      // Five standard deviations of a binomial share.
      EXPECT_NEAR(found == share.end() ? 0 : found->second, expected,
                  5 * std::sqrt(expected * (1 - expected) / 40000) + 1e-6)
          << "token " << i << " at temperature " << temperature;
    }
  }
}

TEST_F(SamplerTest, TopKTopPAndMinPNarrowInThatOrder) {
  const auto support = [this] {
    std::set<int32_t> tokens;
    for (const auto& [token, share] : Frequencies(3000)) tokens.insert(token);
    return tokens;
  };
  params_.top_k = 2;
  EXPECT_EQ(support(), (std::set<int32_t>{2, 3}));
  params_.top_k = 0;
  params_.top_p = 0.6f;  // softmax: .64 .24 .09 .03 .01
  EXPECT_EQ(support(), (std::set<int32_t>{2}));
  params_.top_p = 0.7f;
  EXPECT_EQ(support(), (std::set<int32_t>{2, 3}));
  params_.top_p = 0.9f;
  EXPECT_EQ(support(), (std::set<int32_t>{1, 2, 3}));
  params_.top_k = 2;  // among the two likeliest the first holds .73, so .7 is reached by it alone
  params_.top_p = 0.7f;
  EXPECT_EQ(support(), (std::set<int32_t>{2}));
  params_.top_k = 0;
  params_.top_p = 1.0f;
  params_.min_p = 0.3f;  // e^-1 = .37 stays, e^-2 = .14 leaves
  EXPECT_EQ(support(), (std::set<int32_t>{2, 3}));
  params_.top_k = 3;
  EXPECT_EQ(support(), (std::set<int32_t>{2, 3}));
}

TEST_F(SamplerTest, NucleusEqualsSortingEverything) {
  // The floor that spares the sort must never change the nucleus.
  logits_.resize(2000);
  for (size_t i = 0; i < logits_.size(); ++i) {
    logits_[i] = 6.0f * static_cast<float>(UniformAt(11, i)) * static_cast<float>(UniformAt(12, i));
  }
  params_.top_p = 0.4f;
  std::vector<std::pair<double, int32_t>> sorted;
  double mass = 0;
  for (size_t i = 0; i < logits_.size(); ++i) {
    sorted.emplace_back(-std::exp(logits_[i]), i);
    mass += std::exp(logits_[i]);
  }
  std::sort(sorted.begin(), sorted.end());
  std::set<int32_t> nucleus;
  double covered = 0;
  for (const auto& [weight, token] : sorted) {
    if (covered >= 0.4 * mass) break;
    covered -= weight;
    nucleus.insert(token);
  }
  for (const auto& [token, share] : Frequencies(20000)) EXPECT_TRUE(nucleus.contains(token));
}

TEST_F(SamplerTest, SameSeedAndIndexDrawTheSameWhateverElse) {
  params_.seed = 99;
  std::vector<int32_t> first;
  for (int i = 0; i < 50; ++i) {
    tokens_.assign(1 + i, 3);
    first.push_back(Sample().token);
  }
  for (int i = 49; i >= 0; --i) {
    tokens_.assign(1 + i, 4);
    EXPECT_EQ(Sample().token, first[i]);
  }
  params_.seed = 100;
  int different = 0;
  for (int i = 0; i < 50; ++i) {
    tokens_.assign(1 + i, 3);
    different += Sample().token != first[i];
  }
  EXPECT_GT(different, 5);
}

// Narrowing in every way, and not at all.
std::vector<SamplingParams> EveryNarrowing() {
  return {{}, {.top_k = 3}, {.top_p = 0.9f}, {.min_p = 0.1f}, {.top_k = 4, .top_p = 0.5f}};
}

TEST_F(SamplerTest, TheSmallestTemperatureIsGreedy) {
  for (const SamplingParams& params : EveryNarrowing()) {
    params_ = params;
    params_.temperature = 1e-40f;  // its inverse is infinite
    EXPECT_EQ(Sample().token, 2);
  }
}

TEST_F(SamplerTest, LogitsThatAreNotFiniteStillGiveAToken) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<std::vector<float>> faults = {
      {0, 1, kInfinity, 2}, {NAN, 1, 2, 3}, {0, NAN, 2, NAN}, {NAN, NAN, NAN, NAN}};
  for (const std::vector<float>& logits : faults) {
    for (const SamplingParams& params : EveryNarrowing()) {
      row_.sampling = &params;
      std::vector<float> copy = logits;
      const int32_t token = Sampler(4).Sample(row_, {}, copy).token;
      EXPECT_GE(token, 0);
      EXPECT_LT(token, 4);
      if (std::isinf(logits[2])) {
        EXPECT_EQ(token, 2);
      }
    }
  }
}

TEST_F(SamplerTest, PenaltiesFollowTheirDefinitions) {
  params_.temperature = 0;
  tokens_ = {2, 3, 3};  // prompt 2, output 3 3
  prompt_tokens_ = 1;
  params_.repetition_penalty = 4.0f;  // 3 -> .75, 2 -> .5, so token 1 (1.0) wins
  EXPECT_EQ(Sample().token, 1);
  params_.repetition_penalty = 1.0f;
  params_.presence_penalty = 2.0f;  // output only: 2 stays at 3
  EXPECT_EQ(Sample().token, 2);
  tokens_ = {0, 2, 2, 2};
  EXPECT_EQ(Sample().token, 3);  // 3 - 2 = 1 < 2
  params_.presence_penalty = 0.0f;
  params_.frequency_penalty = 0.3f;  // 3 - .9 = 2.1 > 2
  EXPECT_EQ(Sample().token, 2);
  params_.frequency_penalty = 0.4f;  // 3 - 1.2 = 1.8 < 2
  EXPECT_EQ(Sample().token, 3);
  logits_[4] = -1.0f;
  params_ = {.temperature = 0, .repetition_penalty = 2.0f};
  tokens_ = {4};
  params_.logit_bias = {{4, 5.0f}};  // bias first (4.0), then the penalty divides: 2.0
  EXPECT_EQ(Sample().token, 2);
}

TEST_F(SamplerTest, BiasAndBansMoveTheChoiceButNotTheToldLogprob) {
  params_.temperature = 0;
  params_.logit_bias = {{4, 100.0f}};
  const TokenResult biased = Sample();
  EXPECT_EQ(biased.token, 4);
  EXPECT_NEAR(biased.logprob, -1.0 - StatsOf(logits_).log_sum_exp, 1e-6);
  params_.logit_bias.clear();
  banned_ = {2, 3};
  EXPECT_EQ(Sample().token, 1);
  params_.temperature = 1;
  for (const auto& [token, share] : Frequencies(100)) EXPECT_NE(token, -1);
}

TEST_F(SamplerTest, TopLogprobsAreDescendingAndOfTheModelItself) {
  params_.temperature = 0;
  params_.top_logprobs = 3;
  params_.logit_bias = {{2, -50.0f}};
  const TokenResult result = Sample();
  EXPECT_EQ(result.token, 3);
  ASSERT_EQ(result.top.size(), 3u);
  EXPECT_EQ(result.top[0].first, 2);
  EXPECT_EQ(result.top[1].first, 3);
  EXPECT_EQ(result.top[2].first, 1);
  EXPECT_NEAR(result.top[0].second, 3.0 - StatsOf(logits_).log_sum_exp, 1e-6);
}

TEST_F(SamplerTest, ScoreTellsTheTargetsLogprob) {
  row_.use = LogitRow::Use::kScore;
  row_.target = 4;
  const TokenResult result = Sample();
  EXPECT_EQ(result.token, 4);
  EXPECT_NEAR(result.logprob, -1.0 - StatsOf(logits_).log_sum_exp, 1e-6);
}

TEST(UniformAt, IsUniformAndUncorrelatedBetweenSeeds) {
  double sum = 0, product = 0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    const double a = UniformAt(1, i), b = UniformAt(2, i);
    ASSERT_GE(a, 0.0);
    ASSERT_LT(a, 1.0);
    sum += a;
    product += (a - 0.5) * (b - 0.5);
  }
  EXPECT_NEAR(sum / kDraws, 0.5, 5 * std::sqrt(1.0 / 12 / kDraws));
  EXPECT_NEAR(product / kDraws, 0.0, 5 * (1.0 / 12) / std::sqrt(kDraws));
}

}  // namespace
}  // namespace espalier
