// The least time a step can take on a machine, and so the share of it that a figure reaches.
//
//   memory  = (weights read once + K and V of every row's context) / DRAM read bandwidth
//   compute = 2 * (matrix weights of all layers * rows + LM head * logit rows) / peak of the weight
//             type + 4 * layers * heads * head_dim * context of every row / fp32 peak
//   step    = the larger of the two
//
// Weights that stay in a cache between steps are read faster than this: a share above 1 is then
// possible and says so.
#pragma once

#include <cstdint>

#include "engine/model_config.h"
#include "kernels/weight.h"

namespace espalier {

// Measured on this machine with all threads.
struct MachineCeilings {
  double read_bytes_per_s = 0;  // from DRAM
  double f32_ops_per_s = 0;     // a fused multiply-add counts two
  double int8_ops_per_s = 0;    // a multiply-accumulate counts two
};

// What a token costs, from a model's dimensions and its storage.
struct ModelCosts {
  double weight_bytes = 0;        // read by each step
  double kv_bytes_per_token = 0;  // K and V of all layers
  double matrix_weights = 0;      // of all layers: a row multiplies each once
  double head_weights = 0;        // of the LM head
  double attention_ops = 0;       // fp32, per row and token of its context
  WeightType type = WeightType::kInt8;
};

// `weight_bytes`: of all weights as they lie in memory, the embedding among them.
ModelCosts CostsOf(const ModelConfig& config, double weight_bytes, WeightType type,
                   double kv_value_bytes);

// Rows of one step.
struct StepShape {
  double rows = 0;
  double logit_rows = 0;
  double kv_tokens = 0;    // tokens whose K and V are read, each sequence's once
  double context_sum = 0;  // tokens attended to, summed over rows
};

// Seconds.
double LeastStepTime(const MachineCeilings& ceilings, const ModelCosts& costs,
                     const StepShape& step);

// Tokens per second when `batch` sequences decode at a context of `mean_context` tokens.
double DecodeRoofline(const MachineCeilings& ceilings, const ModelCosts& costs, int batch,
                      double mean_context);

// Tokens per second when `batch` prompts of `prompt` tokens are prefilled in steps of at most
// `step_rows` rows.
double PrefillRoofline(const MachineCeilings& ceilings, const ModelCosts& costs, int batch,
                       int prompt, int step_rows);

}  // namespace espalier
