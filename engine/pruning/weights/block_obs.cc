#include "engine/pruning/weights/block_obs.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "engine/pruning/weights/factor.h"
#include "engine/pruning/weights/loops.h"
#include "engine/pruning/weights/mask.h"

namespace espalier {
namespace {

constexpr double kDamping = 0.01;  // of the mean of the whole diagonal, as SparseGPT's
constexpr int64_t kFactor = int64_t{kMomentBlock} * kObsWidth;

}  // namespace

absl::StatusOr<BlockObs> BlockObs::Create(const ColumnMoments& moments, bool centred,
                                          Backend* backend) {
  BlockObs obs(moments.columns());
  obs.factors_.resize(moments.block_count() * kFactor);
  obs.column_weights_.resize(moments.columns());
  const std::vector<float> squares = moments.Squares();
  const double damping =
      kDamping * std::accumulate(squares.begin(), squares.end(), 0.0) /
      (static_cast<double>(std::max<int64_t>(moments.tokens(), 1)) * moments.columns());
  const std::vector<float> means = centred ? moments.Mean() : std::vector<float>(obs.columns_);
  std::vector<uint8_t> failed(moments.block_count());
  backend->ParallelFor(moments.block_count(), [&](int b) {
    const int width = moments.block_width(b);
    float* const factor = obs.factors_.data() + b * kFactor;
    std::vector<float> block = moments.Block(b);
    const float* const mean = means.data() + int64_t{b} * kMomentBlock;
    for (int i = 0; i < width; ++i) {
      for (int j = 0; j < width; ++j) block[i * width + j] -= mean[i] * mean[j];
    }
    // A mean far beyond its deviation leaves rounding in its place.
    bool done = false;
    for (const double times : {1.0, 10.0, 100.0}) {
      done = done || ToSmallInverseFactor(width, times * damping, block.data(), kObsWidth, factor);
    }
    failed[b] = done ? 0 : 1;
    for (int j = 0; j < width; ++j) {
      const float diagonal = factor[j * kObsWidth + j];
      obs.column_weights_[b * kMomentBlock + j] = 1 / (diagonal * diagonal);
    }
  });
  const auto bad = std::ranges::find(failed, 1);
  if (bad == failed.end()) return obs;
  const auto first = (bad - failed.begin()) * kMomentBlock;
  return absl::InvalidArgumentError(
      fmt::format("second moments of columns {} to {}: expected a positive definite matrix", first,
                  std::min<int64_t>(first + kMomentBlock, moments.columns()) - 1));
}

void BlockObs::Prune(const Pattern& pattern, Matrix weights, Backend* backend) const {
  const WeightLoops& loops = BestWeightLoops();
  // Groups that blocks would cut are masked beforehand, as is what has no groups.
  const bool beforehand = !pattern.grouped() || kMomentBlock % pattern.group != 0;
  const int tasks = (weights.rows + kObsRows - 1) / kObsRows;
  backend->ParallelFor(tasks, [&](int task) {
    const int first = task * kObsRows, rows = std::min(kObsRows, weights.rows - first);
    std::vector<float> masked(columns_);
    std::vector<uint8_t> pruned(beforehand ? int64_t{rows} * columns_ : 0);
    float threshold = 0;
    for (int r = 0; beforehand && r < rows; ++r) {
      std::copy_n(weights.row(first + r), columns_, masked.data());
      MaskRow(pattern, masked.data(), column_weights_.data(), columns_, &threshold);
      for (int j = 0; j < columns_; ++j) pruned[int64_t{r} * columns_ + j] = masked[j] == 0 ? 1 : 0;
    }
    for (int begin = 0; begin < columns_; begin += kMomentBlock) {
      loops.obs_rows({.weights = weights.row(first) + begin,
                      .stride = weights.stride,
                      .rows = rows,
                      .width = std::min(kMomentBlock, columns_ - begin),
                      .factor = factors_.data() + begin / kMomentBlock * kFactor,
                      .pruned = beforehand ? pruned.data() + begin : nullptr,
                      .pruned_stride = columns_,
                      .keep = pattern.keep,
                      .group = pattern.group});
    }
  });
}

}  // namespace espalier
