// The decoder of the llama family: weights on a backend, and one forward pass over a step's rows.
//
// Dense is the keep profile that keeps everything: the pass always asks the selector, and there is
// no other path. Heads and channels are rows of q, gate, up and (as files have them, columns) o,
// down.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/activations.h"
#include "engine/model/files/model_file.h"
#include "engine/model/weight_plan.h"
#include "engine/model_config.h"
#include "engine/pruning/channel_selector.h"
#include "engine/scheduling/batch.h"
#include "kernels/backend.h"
#include "policy/keep_profile.h"

namespace espalier {

// What attention needs to know of a step; made once and used by every layer.
struct StepPlan {
  std::span<const int32_t> tokens;  // [rows]
  std::span<const AttentionSpan> spans;
  std::span<const std::span<const int32_t>> tables;  // [layers * spans], layer-major
};

class Decoder {
 public:
  // Uploads every weight of `file`, calling progress(done, total) after each. Errors name file and
  // tensor. `backend` must outlive the model; `file` may be closed afterwards.
  static absl::StatusOr<std::unique_ptr<Decoder>> Load(
      const ModelFile& file, Backend* backend, WeightPlan plan,
      const std::function<void(int done, int total)>& progress);

  const ModelConfig& config() const { return config_; }
  uint64_t weight_bytes() const { return weight_bytes_; }
  // The types of its matrices, e.g. "int4+int8".
  std::string weight_types() const;

  // Runs all layers over the plan's rows; afterwards activations->residual holds the last layer's
  // output and the pages hold K and V of every row. Adds its times to `phases`.
  void Forward(const StepPlan& plan, const KeepProfile& keep, ChannelSelector* selector,
               KvPool* pool, Activations* activations, PhaseTimes* phases);

  // Final norm and LM head of the residual rows listed (ascending); logits is [rows listed,
  // vocabulary].
  void Logits(std::span<const int32_t> rows, Activations* activations, Matrix logits);

  // Called with the residual stream after each layer ([rows, hidden]); for tests and calibration.
  void set_layer_observer(std::function<void(int layer, ConstMatrix residual)> observer) {
    observer_ = std::move(observer);
  }

 private:
  struct Layer {
    std::vector<float> attention_norm;
    std::vector<float> mlp_norm;
    Weight q, k, v;                             // [heads * head_dim | kv_heads * head_dim, hidden]
    std::vector<float> q_bias, k_bias, v_bias;  // one a row, or empty
    std::vector<float> q_norm, k_norm;          // [head_dim] or empty
    Weight o;                                   // [heads * head_dim, hidden]
    Weight gate, up;                            // [channels, hidden]
    Weight down;                                // [channels, hidden]
  };

  Decoder(const ModelConfig& config, Backend* backend);

  void AttentionBlock(int layer, const StepPlan& plan, const ChannelSelection& heads, KvPool* pool,
                      Activations* activations, PhaseTimes* phases);
  void MlpBlock(int layer, const ChannelSelection& channels, int rows, Activations* activations,
                PhaseTimes* phases);
  // The weight rows of the listed heads, head_dim for each.
  ChannelSelection HeadRows(const ChannelSelection& heads);
  // The biases of those rows, if there are any.
  std::span<const float> HeadBias(std::span<const float> bias, const ChannelSelection& head_rows);
  // RMS norm of each head for itself, in place; none if `weight` is empty.
  void NormHeads(std::span<const float> weight, const Matrix& x);

  ModelConfig config_;
  Backend* backend_;
  std::vector<Layer> layers_;
  Weight embedding_;
  Weight head_;  // the embedding itself if tied
  std::vector<float> final_norm_;
  std::vector<float> inverse_frequency_;
  std::vector<int32_t> head_rows_;  // of the block in hand, as is the next
  std::vector<float> head_bias_;
  uint64_t weight_bytes_ = 0;
  std::function<void(int, ConstMatrix)> observer_;
};

}  // namespace espalier
