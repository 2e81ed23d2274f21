#include "engine/pruning/weights/sparsegpt.h"

#include <algorithm>

#include "engine/pruning/weights/loops.h"
#include "engine/pruning/weights/mask.h"

namespace espalier {
namespace {

constexpr int kTaskRows = kObsRows;

}  // namespace

absl::Status SparseGpt(const Pattern& pattern, std::span<const float> factor, Matrix weights,
                       Backend* backend) {
  const WeightLoops& loops = BestWeightLoops();
  const int columns = weights.cols, rows = weights.rows;
  const int block = pattern.grouped() ? kObsWidth / pattern.group * pattern.group : kObsWidth;
  const int tasks = (rows + kTaskRows - 1) / kTaskRows;
  std::vector<float> own(int64_t{kObsWidth} * kObsWidth);  // the block's rows and columns of U
  std::vector<float> errors, masked, scores;
  for (int begin = 0; begin < columns; begin += block) {
    const int width = std::min(block, columns - begin), end = begin + width;
    for (int j = 0; j < width; ++j) {
      std::copy_n(factor.data() + int64_t{begin + j} * columns + begin, width,
                  own.data() + int64_t{j} * kObsWidth);
      std::fill_n(own.data() + int64_t{j} * kObsWidth + width, kObsWidth - width, 0.0f);
    }
    const int64_t values = int64_t{rows} * width;
    if (!pattern.grouped()) {
      masked.resize(values);
      scores.resize(values);
      std::vector<float> column_weights(width);
      for (int j = 0; j < width; ++j) {
        const float diagonal = own[int64_t{j} * kObsWidth + j];
        column_weights[j] = 1 / (diagonal * diagonal);
      }
      backend->ParallelFor(tasks, [&](int task) {
        for (int r = task * kTaskRows; r < std::min((task + 1) * kTaskRows, rows); ++r) {
          loops.score(weights.row(r) + begin, column_weights.data(), width,
                      scores.data() + int64_t{r} * width);
        }
      });
      std::fill(masked.begin(), masked.end(), 1.0f);
      float threshold = 0;
      loops.zero_least(masked.data(), scores.data(), values, pattern.PrunedOf(values), &threshold);
    }
    errors.resize(values);
    backend->ParallelFor(tasks, [&](int task) {
      const int first = task * kTaskRows, count = std::min(kTaskRows, rows - first);
      std::vector<uint8_t> pruned(pattern.grouped() ? 0 : int64_t{count} * width);
      for (size_t i = 0; i < pruned.size(); ++i) {
        pruned[i] = masked[int64_t{first} * width + i] == 0 ? 1 : 0;
      }
      loops.obs_rows({.weights = weights.row(first) + begin,
                      .stride = weights.stride,
                      .rows = count,
                      .width = width,
                      .factor = own.data(),
                      .pruned = pattern.grouped() ? nullptr : pruned.data(),
                      .pruned_stride = width,
                      .keep = pattern.keep,
                      .group = pattern.group,
                      .errors = errors.data() + int64_t{first} * width});
    });
    if (end == columns) break;
    // Columns right of the block: W -= errors * U[block, right].
    const absl::StatusOr<Weight> right =
        backend->UploadWeight(WeightType::kF32, WeightLayout::kOutputRows, columns - end, width,
                              {.read_values = [&](int c, float* dst) {
                                for (int k = 0; k < width; ++k) {
                                  dst[k] = -factor[int64_t{begin + k} * columns + end + c];
                                }
                              }});
    if (!right.ok()) return right.status();
    const MatMulTarget target[] = {
        {.weight = &*right,
         .out = Matrix(weights.data + end, rows, columns - end, weights.stride)}};
    backend->MatMul({.x = ConstMatrix(errors.data(), rows, width),
                     .targets = target,
                     .output = MatMulArgs::Output::kAdd});
    if (absl::Status status = backend->Synchronize(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace espalier
