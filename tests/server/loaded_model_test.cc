// What is known of a model before and while it is loaded.
#include "server/loaded_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "engine/model/pruning_file.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

// By the ledger of the executor that is loaded, a reload is let in by an estimate.
void ExpectGoodEstimate(const std::string& model, const std::string& ladder_path, WeightPlan plan) {
  const std::shared_ptr<const ModelFile> file = ModelFile::Open(model).value();
  ServerOptions options;
  options.weights = plan;
  if (!ladder_path.empty()) options.kv_type = KvType::kInt8;  // for its rungs of four bits
  const auto loaded =
      LoadedModel::Load(options, file, {.ladder = ladder_path, .kv_bytes = 16 << 20}).value();
  CalibratedLadder ladder;
  if (!ladder_path.empty()) ladder = OpenLadder(ladder_path, *file).value();
  const auto estimate = static_cast<double>(
      EstimateWeightBytes(*file, plan, ladder_path.empty() ? nullptr : &ladder));
  const auto truth = static_cast<double>(loaded->executor().ledger({}).weights);
  EXPECT_NEAR(estimate / truth, 1, 0.05) << estimate << " of " << truth;
}

TEST(LoadedModelTest, EstimatesItsWeights) {
  ExpectGoodEstimate(ESPALIER_TINY_MODEL, "", WeightPlan::kAuto);
  ExpectGoodEstimate(ESPALIER_TINY_MODEL, "", WeightPlan::kF32);
}

TEST(LoadedModelTest, EstimatesPanelsAndRefitsOfItsLadder) {
  ESPALIER_PATH_OR_SKIP(model, "ESPALIER_MODEL");
  if (!model.ends_with("SmolLM2-135M-Instruct.Q4_1.gguf")) GTEST_SKIP() << "the ladder's model";
  ExpectGoodEstimate(model, ESPALIER_LADDER, WeightPlan::kAuto);
  ExpectGoodEstimate(model, ESPALIER_LADDER, WeightPlan::kBf16);
}

TEST(LoadedModelTest, APolicyNeedsItsRungs) {
  ServerOptions options;
  options.policy = ServerOptions::PolicyKind::kFixed;
  options.fixed_rung = 2;
  EXPECT_TRUE(CheckPolicy(options, "a.ladder", 3).ok());
  for (const char* ladder : {"", "a.ladder"}) {
    const absl::Status status = CheckPolicy(options, ladder, 2);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), HasSubstr("--policy: fixed:2"));
  }
  options.policy = ServerOptions::PolicyKind::kLadder;
  EXPECT_TRUE(CheckPolicy(options, "", 1).ok());
  options.policy = ServerOptions::PolicyKind::kDqn;
  EXPECT_TRUE(CheckPolicy(options, ESPALIER_LADDER, 9).ok());
  absl::Status status = CheckPolicy(options, ESPALIER_LADDER, 2);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr(".dqn"));
  status = CheckPolicy(options, "", 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--policy: dqn needs a ladder"));
}

}  // namespace
}  // namespace espalier
