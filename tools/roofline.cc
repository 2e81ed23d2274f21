#include "tools/roofline.h"

#include <algorithm>
#include <cmath>

namespace espalier {

ModelCosts CostsOf(const ModelConfig& config, double weight_bytes, WeightType type,
                   double kv_value_bytes) {
  const double hidden = config.hidden;
  const double query = double{1} * config.heads * config.head_dim;
  const double key = double{1} * config.kv_heads * config.head_dim;
  const double layer = hidden * (2 * query + 2 * key + 3.0 * config.channels);
  const double matrices = layer * config.layers;
  const double head = hidden * config.vocabulary;
  // An embedding of its own is held but hardly read: one row per token.
  const double read = config.tied_embeddings ? 1 : (matrices + head) / (matrices + 2 * head);
  return {
      .weight_bytes = weight_bytes * read,
      .kv_bytes_per_token = 2 * key * config.layers * kv_value_bytes,
      .matrix_weights = matrices,
      .head_weights = head,
      .attention_ops = 4 * query * config.layers,
      .type = type,
  };
}

double LeastStepTime(const MachineCeilings& ceilings, const ModelCosts& costs,
                     const StepShape& step) {
  const double memory =
      (costs.weight_bytes + costs.kv_bytes_per_token * step.kv_tokens) / ceilings.read_bytes_per_s;
  const double matrix_peak = IsFloat(costs.type) ? ceilings.f32_ops_per_s : ceilings.int8_ops_per_s;
  const double matrix_ops =
      2 * (costs.matrix_weights * step.rows + costs.head_weights * step.logit_rows);
  const double compute =
      matrix_ops / matrix_peak + costs.attention_ops * step.context_sum / ceilings.f32_ops_per_s;
  return std::max(memory, compute);
}

double DecodeRoofline(const MachineCeilings& ceilings, const ModelCosts& costs, int batch,
                      double mean_context) {
  const double tokens = batch * mean_context;
  return batch / LeastStepTime(ceilings, costs,
                               {.rows = double(batch),
                                .logit_rows = double(batch),
                                .kv_tokens = tokens,
                                .context_sum = tokens});
}

double PrefillRoofline(const MachineCeilings& ceilings, const ModelCosts& costs, int batch,
                       int prompt, int step_rows) {
  // All steps are taken as equal: rows, logits and attention divide evenly among them.
  const double rows = double{1} * batch * prompt;
  const double steps = std::ceil(rows / step_rows);
  const double attended = rows * (prompt + 1) / 2;
  return rows / (steps * LeastStepTime(ceilings, costs,
                                       {.rows = rows / steps,
                                        .logit_rows = batch / steps,
                                        .kv_tokens = rows / steps,
                                        .context_sum = attended / steps}));
}

}  // namespace espalier
