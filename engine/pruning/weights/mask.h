// Which weights of a matrix leave, by score: one pass over the matrix, no sort, no Hessian.
#pragma once

#include <cstdint>
#include <string_view>

#include "engine/pruning/weights/loops.h"
#include "engine/pruning/weights/metric.h"
#include "engine/pruning/weights/pattern.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

// How a pattern without groups finds what is below. N:M needs neither: every pair of a group is
// compared.
enum class Selection : uint8_t {
  // Exactly the share asked for of each row, by bisection on a threshold.
  kExact,
  // SwiftPrune's streaming threshold over a row: score < m + k d, with m and d the exponentially
  // weighted mean and mean absolute deviation of the scores before it, from those of the first 16
  // (constants as TCP's round-trip timer, alpha = beta = 1/8). How the paper gets from it to a
  // share is not known to us. Our definition: k is calibrated per matrix, and as m and d do not
  // depend on it, it is a quantile of (score - m) / d over a sample of rows.
  kEwma,
};
inline constexpr std::string_view kSelectionNames[] = {"exact", "ewma"};

struct MaskOptions {
  Pattern pattern;
  Selection selection = Selection::kExact;
  // EWMA rows are brought to the exact count: of too many pruned the best come back, of too few the
  // least go too.
  bool strict = true;
  float alpha = 0.125f;  // the published constants; 0.02 keeps more saliency
  float beta = 0.125f;
  // Scores compete over the whole matrix in place of a row, as magnitude pruning's do. Of kExact
  // without groups only.
  bool whole_matrix = false;
};

// Zeroes what is pruned in place. `weights` is [outputs, inputs], all finite.
Saliency MaskWeights(const MaskOptions& options, const ColumnWeights& columns, Matrix weights,
                     Backend* backend);

// One row, by scores w^2 * c, exactly; `threshold` as WeightLoops::zero_least.
Saliency MaskRow(const Pattern& pattern, float* weights, const float* column_weights, int columns,
                 float* threshold);

}  // namespace espalier
