// `espalier prune`'s one way through a model: layer by layer, each loaded, watched over calibration
// text, pruned, written and dropped, so that memory holds one layer and the calibration's
// activations: the residual stream of all tokens, and what else a step of them needs.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model/files/model_rewriter.h"
#include "engine/model/weight_plan.h"
#include "engine/pruning/weights/input_moments.h"
#include "engine/pruning/weights/mask.h"
#include "engine/pruning/weights/metric.h"
#include "engine/pruning/weights/pattern.h"
#include "kernels/backend.h"

namespace espalier {

// How a layer's matrices are pruned once their inputs are known.
enum class WeightMethod : uint8_t {
  kScores,     // by a metric and a selection
  kBlockObs,   // --quality
  kSparseGpt,  // the baseline
};

// What a matrix is calibrated on: what the layers before it leave, and its own layer.
enum class CalibratedOn : uint8_t {
  kPrunedMatrices,  // pruned, all before the matrix itself: all text goes through a layer once, in
                    // one step, and no value is rounded yet to what the file stores
  kPrunedLayers,    // layers pruned, its own dense: a second pass through each
  kDense,           // all dense
};
inline constexpr std::string_view kCalibratedOnNames[] = {"sequential", "pruned", "dense"};

struct WeightPruningOptions {
  WeightMethod method = WeightMethod::kScores;
  Metric metric = Metric::kWanda;
  MaskOptions mask;
  bool compensate_mean = false;
  CalibratedOn calibrated_on = CalibratedOn::kPrunedMatrices;
  // Position 0 of each window, whose activations are many times those of others, is left out.
  bool skip_first = false;
  // What a server saw of the model's inputs, in place of text to run: of dense activations, for
  // kScores. Null: there is none.
  const InputMoments* moments = nullptr;
  WeightPlan weights = WeightPlan::kAuto;  // of the layers that calibration text runs through
  int step_rows = 512;                     // of kPrunedLayers and kDense
};

// The matrices of a layer, as files name them.
inline constexpr std::array<std::string_view, 7> kPrunedKinds = {
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};

struct WeightPruningReport {
  // One matrix of one layer, or the sum of some. Seconds.
  struct Site {
    int64_t weights = 0;
    int64_t zeros = 0;    // after pruning
    double saliency = 0;  // sum of scores before: the metric's, or w^2 x^2 where there is none
    double kept = 0;      // of what stays, by its values before
    double read = 0;      // weights from the file, as fp32
    double select = 0;    // scores and zeros: a score is part of the loop that selects
    double update = 0;    // compensation; factors, masks and updates of the other two methods
    double write = 0;

    Site& operator+=(const Site& other);
  };
  struct Layer {
    double load = 0;        // packing it to run it, seconds
    double forward = 0;     // running it
    double statistics = 0;  // sums over what its matrices met
    std::array<Site, kPrunedKinds.size()> sites;
  };
  std::vector<Layer> layers;
  double total_s = 0;  // wall time of all layers
  int64_t tokens = 0;

  // Of a kind over all layers; of all kinds.
  Site Sum(size_t kind) const;
  Site Sum() const;
};

// Whether a tensor is one of kPrunedKinds.
bool IsPruned(const StoredTensor& tensor);

// Gives the new values of all such tensors to `rewriter`; finishing it is the caller's. `windows`
// are as long as each other; none are needed if nothing looks at inputs or there are moments.
// InvalidArgument, with file, tensor, row and column, for a weight that is not finite. Cancelled if
// progress(layers done, layers) says false.
absl::StatusOr<WeightPruningReport> PruneWeights(
    const WeightPruningOptions& options, const ModelFile& file,
    std::span<const std::vector<int32_t>> windows, ModelRewriter* rewriter, Backend* backend,
    const std::function<bool(int done, int total)>& progress);

}  // namespace espalier
