// Greedy generation through the engine as served, against the golden continuations: equal up to the
// first step whose margin is below the path's logit tolerance.
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model/model_executor.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "nlohmann/json.hpp"
#include "tests/engine/model/forward_harness.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

using nlohmann::json;

std::vector<std::vector<int32_t>> GenerateGreedily(const std::string& path, WeightPlan weights,
                                                   KvType kv, const std::vector<json>& cases) {
  auto backend = CreateCpuBackend({}).value();
  const auto file = ModelFile::Open(path).value();
  auto executor = ModelExecutor::Load(*file, backend.get(), {.weights = weights, .kv = kv}).value();
  FixedPolicy dense(0);
  Engine engine({}, executor->kv_geometry(), executor->ladder(), executor.get(), &dense);
  for (size_t i = 0; i < cases.size(); ++i) {
    Request request{.id = i, .prompt = cases[i]["prompt_ids"].get<std::vector<int32_t>>()};
    request.sampling.temperature = 0;
    request.stop.max_tokens = static_cast<int>(cases[i]["ids"].size());
    EXPECT_TRUE(engine.Submit(request).ok());
  }
  std::vector<std::vector<int32_t>> answers(cases.size());
  while (!engine.idle()) {
    const StepReport* report = engine.Step(Instant(0)).value();
    for (const SequenceOutput& output : report->outputs) {
      for (const TokenResult& token : output.tokens) answers[output.id].push_back(token.token);
    }
  }
  return answers;
}

class GreedyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
    ESPALIER_PATH_OR_SKIP(model, "ESPALIER_MODEL");
    model_ = model;
    std::ifstream lines(golden + "/greedy/greedy_fp32.jsonl");
    for (std::string line; std::getline(lines, line);) cases_.push_back(json::parse(line));
    ASSERT_EQ(cases_.size(), 24u);
  }

  // Steps that agree before the first whose margin is below `tolerance`; a difference before that
  // fails the test.
  int CompareUpTo(double tolerance, const std::vector<std::vector<int32_t>>& answers) {
    int compared = 0;
    for (size_t i = 0; i < cases_.size(); ++i) {
      const auto expected = cases_[i]["ids"].get<std::vector<int32_t>>();
      const auto margins = cases_[i]["margin"].get<std::vector<double>>();
      EXPECT_EQ(answers[i].size(), expected.size());
      for (size_t step = 0; step < expected.size(); ++step) {
        if (margins[step] < tolerance) break;
        EXPECT_EQ(answers[i][step], expected[step])
            << cases_[i]["prompt"] << " step " << step << ", margin " << margins[step];
        if (answers[i][step] != expected[step]) break;
        ++compared;
      }
    }
    return compared;
  }

  std::string model_;
  std::vector<json> cases_;
};

TEST_F(GreedyTest, Fp32EqualsTheGoldenContinuations) {
  const int compared =
      CompareUpTo(5e-3, GenerateGreedily(model_, WeightPlan::kF32, KvType::kF32, cases_));
  std::cout << "fp32: " << compared << " of 1536 steps compared\n";
  EXPECT_GT(compared, 1200);
}

TEST_F(GreedyTest, Int8EqualsThemWhereTheMarginIsBeyondQuantisation) {
  // llama.cpp's q8 activations move logits by some tenths (golden README); its largest first
  // difference lies at a margin of 0.294.
  for (const KvType kv : {KvType::kF16, KvType::kInt8}) {
    const int compared = CompareUpTo(0.6, GenerateGreedily(model_, WeightPlan::kInt8, kv, cases_));
    std::cout << KvTypeName(kv) << " KV: " << compared << " of 1536 steps compared\n";
    EXPECT_GT(compared, 100);
  }
}

}  // namespace
}  // namespace espalier
