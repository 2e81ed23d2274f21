#include "tools/roofline.h"

#include <gtest/gtest.h>

namespace espalier {
namespace {

// SmolLM2-135M on a Cascade Lake with 2 cores, for which the bounds were worked out by hand.
const MachineCeilings kCeilings = {
    .read_bytes_per_s = 23.3e9, .f32_ops_per_s = 298e9, .int8_ops_per_s = 1199e9};

ModelConfig SmolLm2() {
  ModelConfig config;
  config.layers = 30;
  config.hidden = 576;
  config.heads = 9;
  config.kv_heads = 3;
  config.head_dim = 64;
  config.channels = 1536;
  config.vocabulary = 49152;
  config.tied_embeddings = true;
  return config;
}

// Values and their scales: one fp32 scale per 64 int8 values.
ModelCosts Int8Costs() { return CostsOf(SmolLm2(), 134.5e6 * 68 / 64, WeightType::kInt8, 2); }

TEST(CostsOf, CountsTheModel) {
  const ModelCosts costs = Int8Costs();
  EXPECT_DOUBLE_EQ(costs.matrix_weights, 106'168'320);
  EXPECT_DOUBLE_EQ(costs.head_weights, 28'311'552);
  EXPECT_DOUBLE_EQ(costs.kv_bytes_per_token, 23'040);
  EXPECT_DOUBLE_EQ(costs.attention_ops, 69'120);
}

TEST(CostsOf, AnEmbeddingOfItsOwnIsNotRead) {
  ModelConfig config = SmolLm2();
  config.tied_embeddings = false;
  const double values = 106'168'320 + 2 * 28'311'552.0;
  EXPECT_DOUBLE_EQ(CostsOf(config, 4 * values, WeightType::kF32, 4).weight_bytes,
                   4 * (values - 28'311'552));
}

TEST(DecodeRoofline, MatchesTheBoundsWorkedOutByHand) {
  const ModelCosts costs = Int8Costs();
  EXPECT_NEAR(DecodeRoofline(kCeilings, costs, 1, 192), 158, 1.58);
  EXPECT_NEAR(DecodeRoofline(kCeilings, costs, 8, 192), 1046, 10.46);
  EXPECT_NEAR(DecodeRoofline(kCeilings, costs, 32, 192), 2621, 26.21);
}

TEST(PrefillRoofline, MatchesTheBoundsWorkedOutByHand) {
  EXPECT_NEAR(PrefillRoofline(kCeilings, Int8Costs(), 1, 128, 512), 5219, 52);
  EXPECT_NEAR(PrefillRoofline(kCeilings, Int8Costs(), 1, 512, 512), 4246, 42);
}

TEST(PrefillRoofline, OfF32WeightsUsesTheF32Peak) {
  const ModelCosts costs = CostsOf(SmolLm2(), 538e6, WeightType::kF32, 2);
  EXPECT_NEAR(PrefillRoofline(kCeilings, costs, 1, 512, 512), 1313, 26);
}

TEST(PrefillRoofline, SmallStepsAreBoundByReadingTheWeightsAgain) {
  const ModelCosts costs = Int8Costs();
  EXPECT_NEAR(PrefillRoofline(kCeilings, costs, 1, 128, 1), DecodeRoofline(kCeilings, costs, 1, 1),
              1);
}

TEST(LeastStepTime, IsTheLargerOfMemoryAndCompute) {
  const ModelCosts costs = {.weight_bytes = 100,
                            .kv_bytes_per_token = 1,
                            .matrix_weights = 10,
                            .head_weights = 5,
                            .attention_ops = 2,
                            .type = WeightType::kF32};
  const MachineCeilings ceilings = {
      .read_bytes_per_s = 10, .f32_ops_per_s = 20, .int8_ops_per_s = 1e9};
  EXPECT_DOUBLE_EQ(LeastStepTime(ceilings, costs, {.rows = 1, .logit_rows = 1, .kv_tokens = 50}),
                   15);
  EXPECT_DOUBLE_EQ(
      LeastStepTime(ceilings, costs, {.rows = 100, .logit_rows = 2, .context_sum = 30}), 104);
}

}  // namespace
}  // namespace espalier
