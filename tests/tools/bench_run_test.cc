#include "tools/bench_run.h"

#include <gtest/gtest.h>

#include <vector>

namespace espalier {
namespace {

// Draws token 0 everywhere and notes what it was given.
class CountingExecutor final : public Executor {
 public:
  absl::Status Execute(const Batch& batch, StepResult* result) override {
    ++steps;
    rows += batch.rows();
    for (const int32_t token : batch.tokens) {
      EXPECT_GE(token, 0);
      EXPECT_LT(token, 100);
    }
    if (first_tokens.empty()) first_tokens = batch.tokens;
    result->tokens.assign(batch.logits.size(), {.token = 0});
    result->phases = {.mlp = 0.5};
    return absl::OkStatus();
  }

  int steps = 0;
  int64_t rows = 0;
  std::vector<int32_t> first_tokens;
};

BenchEngine EngineOver(CountingExecutor* executor, const Ladder* ladder) {
  return {.executor = executor,
          .geometry = {.layers = 2, .pages = 2 * 64, .page_tokens = 16, .context = 1024},
          .ladder = ladder,
          .vocabulary = 100,
          .step_rows = 32};
}

const Ladder kLadder = Ladder::DenseOnly({.layers = 2, .heads = 1, .channels = 1});

TEST(RunBench, CountsEveryRowOnce) {
  CountingExecutor executor;
  int64_t done = 0, total = 0;
  const BenchShape shape = {.batch = 3, .prompt = 20, .generate = 10};
  const auto result = RunBench(EngineOver(&executor, &kLadder), shape, 1,
                               [&](int64_t d, int64_t t) { done = d, total = t; });
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(executor.rows, 3 * (20 + 9));
  EXPECT_EQ(done, total);
  EXPECT_EQ(total, executor.rows);
  EXPECT_EQ(result->prefill.tokens, 60);
  EXPECT_EQ(result->prefill.steps + result->decode.steps, executor.steps);
  EXPECT_LE(result->decode.tokens, 27);  // the rest rode along with prefill
  EXPECT_GT(result->decode.tokens, 0);
  EXPECT_DOUBLE_EQ(result->prefill.phases.mlp, 0.5 * result->prefill.steps);
  EXPECT_GE(result->seconds, result->prefill.seconds);
  EXPECT_GT(result->total_tokens_per_s(shape), 0);
}

TEST(RunBench, SameSeedSamePrompts) {
  std::vector<std::vector<int32_t>> prompts;
  for (const uint64_t seed : {1, 1, 2}) {
    CountingExecutor executor;
    ASSERT_TRUE(RunBench(EngineOver(&executor, &kLadder), {.batch = 1, .prompt = 16, .generate = 2},
                         seed, [](int64_t, int64_t) {})
                    .ok());
    prompts.push_back(executor.first_tokens);
  }
  EXPECT_EQ(prompts[0], prompts[1]);
  EXPECT_NE(prompts[0], prompts[2]);
}

TEST(RunBench, WhatCannotFitIsTold) {
  CountingExecutor executor;
  const auto result =
      RunBench(EngineOver(&executor, &kLadder), {.batch = 1, .prompt = 2000, .generate = 2}, 1,
               [](int64_t, int64_t) {});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kOutOfRange);
}

}  // namespace
}  // namespace espalier
