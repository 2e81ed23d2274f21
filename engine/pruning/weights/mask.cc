#include "engine/pruning/weights/mask.h"

#include <algorithm>
#include <vector>

namespace espalier {
namespace {

// Rows of a task: whole EWMA passes, and enough that a threshold found for one row serves the next.
constexpr int kTaskRows = 2 * kEwmaRows;
// Rows that k is calibrated on; of 576 weights each, they are within 0.4 % of the share.
constexpr int kSampleRows = 32;

// One group of any size, the last of a row perhaps: `count` of the n go.
void MaskGroup(float* w, const float* c, int n, int count, Saliency* saliency) {
  float score[kMaxGroup];
  for (int j = 0; j < n; ++j) score[j] = w[j] * w[j] * c[j];
  for (int j = 0; j < n; ++j) {
    int lost = 0;
    for (int o = 0; o < n; ++o) {
      lost += (score[o] > score[j] || (score[o] == score[j] && o > j)) ? 1 : 0;
    }
    saliency->all += score[j];
    if (lost >= n - count) {
      w[j] = 0;
    } else {
      saliency->kept += score[j];
    }
  }
}

Saliency MaskGroupedRow(const Pattern& pattern, float* w, const float* c, int n) {
  const WeightLoops& loops = BestWeightLoops();
  const int whole = n / pattern.group * pattern.group;
  Saliency saliency;
  if (pattern.keep == 2 && pattern.group == 4) {
    saliency = loops.mask_2_4(w, c, whole);
  } else if (pattern.keep == 4 && pattern.group == 8) {
    saliency = loops.mask_4_8(w, c, whole);
  } else {
    for (int j = 0; j < whole; j += pattern.group) {
      MaskGroup(w + j, c + j, pattern.group, pattern.group - pattern.keep, &saliency);
    }
  }
  MaskGroup(w + whole, c + whole, n - whole, std::max(n - whole - pattern.keep, 0), &saliency);
  return saliency;
}

// k so that the share asked for stands below it, over a sample of rows.
float CalibratedK(const MaskOptions& options, const ColumnWeights& columns, Matrix weights,
                  Backend* backend) {
  const WeightLoops& loops = BestWeightLoops();
  const int rows = std::min(weights.rows, kSampleRows);
  const int step = columns.same_for_rows() ? kEwmaRows : 1;
  const int passes = (rows + step - 1) / step;
  const int64_t pass_values = int64_t{weights.cols} * kEwmaRows;
  std::vector<float> standing(passes * pass_values);
  backend->ParallelFor(passes, [&](int pass) {
    // Rows far from each other: neighbours are alike, as those of one head.
    std::vector<float> copy(pass_values), room(weights.cols);
    const int first = pass * step, count = std::min(step, rows - first);
    const float* column_weights = nullptr;
    for (int r = 0; r < count; ++r) {
      const int row = static_cast<int>(int64_t{first + r} * weights.rows / rows);
      std::copy_n(weights.row(row), weights.cols, copy.data() + int64_t{r} * weights.cols);
      column_weights = columns.Of(row, room);
    }
    loops.ewma({.weights = copy.data(),
                .stride = weights.cols,
                .rows = count,
                .columns = weights.cols,
                .column_weights = column_weights,
                .alpha = options.alpha,
                .beta = options.beta,
                .standing = standing.data() + pass * pass_values});
  });
  const int last = rows - (passes - 1) * step;
  int64_t n = passes * pass_values;
  if (last < kEwmaRows) {  // lanes that are no rows
    float* to = standing.data();
    for (int pass = 0; pass < passes; ++pass) {
      const float* from = standing.data() + pass * pass_values;
      const int count = pass + 1 < passes ? step : last;
      for (int j = 0; j < weights.cols; ++j, from += kEwmaRows) to = std::copy_n(from, count, to);
    }
    n = to - standing.data();
  }
  const int64_t below = options.pattern.PrunedOf(n);
  return loops.threshold_of(standing.data(), n, below, kFarStanding) - kFarStanding;
}

}  // namespace

Saliency MaskRow(const Pattern& pattern, float* weights, const float* column_weights, int columns,
                 float* threshold) {
  if (pattern.grouped()) return MaskGroupedRow(pattern, weights, column_weights, columns);
  std::vector<float> scores(columns);
  const WeightLoops& loops = BestWeightLoops();
  loops.score(weights, column_weights, columns, scores.data());
  return loops.zero_least(weights, scores.data(), columns, pattern.PrunedOf(columns), threshold);
}

Saliency MaskWeights(const MaskOptions& options, const ColumnWeights& columns, Matrix weights,
                     Backend* backend) {
  if (weights.rows == 0 || weights.cols == 0) return {};
  const WeightLoops& loops = BestWeightLoops();
  const int64_t count = options.pattern.PrunedOf(weights.cols);
  if (options.whole_matrix && !options.pattern.grouped()) {
    const int64_t n = int64_t{weights.rows} * weights.cols;
    std::vector<float> scores(n), flat(n), room(weights.cols);
    for (int r = 0; r < weights.rows; ++r) {
      loops.score(weights.row(r), columns.Of(r, room), weights.cols,
                  scores.data() + int64_t{r} * weights.cols);
      std::copy_n(weights.row(r), weights.cols, flat.data() + int64_t{r} * weights.cols);
    }
    float threshold = 0;
    const Saliency saliency =
        loops.zero_least(flat.data(), scores.data(), n, options.pattern.PrunedOf(n), &threshold);
    for (int r = 0; r < weights.rows; ++r) {
      std::copy_n(flat.data() + int64_t{r} * weights.cols, weights.cols, weights.row(r));
    }
    return saliency;
  }
  const bool ewma = options.selection == Selection::kEwma && !options.pattern.grouped();
  const float k = ewma ? CalibratedK(options, columns, weights, backend) : 0;
  const int tasks = (weights.rows + kTaskRows - 1) / kTaskRows;
  std::vector<Saliency> saliency(tasks);
  backend->ParallelFor(tasks, [&](int task) {
    const int begin = task * kTaskRows, end = std::min(begin + kTaskRows, weights.rows);
    std::vector<float> scores(weights.cols), room(weights.cols);
    float threshold = 0;
    if (!ewma) {
      for (int r = begin; r < end; ++r) {
        float* const w = weights.row(r);
        const float* const c = columns.Of(r, room);
        if (options.pattern.grouped()) {
          saliency[task] += MaskGroupedRow(options.pattern, w, c, weights.cols);
        } else {
          loops.score(w, c, weights.cols, scores.data());
          saliency[task] += loops.zero_least(w, scores.data(), weights.cols, count, &threshold);
        }
      }
      return;
    }
    std::vector<float> original(int64_t{kEwmaRows} * weights.cols);
    const int step = columns.same_for_rows() ? kEwmaRows : 1;
    for (int first = begin; first < end; first += step) {
      const int rows = std::min(step, end - first);
      for (int r = 0; options.strict && r < rows; ++r) {
        std::copy_n(weights.row(first + r), weights.cols,
                    original.data() + int64_t{r} * weights.cols);
      }
      const Saliency kept = loops.ewma({.weights = weights.row(first),
                                        .stride = weights.stride,
                                        .rows = rows,
                                        .columns = weights.cols,
                                        .column_weights = columns.Of(first, room),
                                        .alpha = options.alpha,
                                        .beta = options.beta,
                                        .k = k});
      if (!options.strict) saliency[task] += kept;
      for (int r = 0; options.strict && r < rows; ++r) {
        saliency[task] += loops.settle(
            weights.row(first + r), original.data() + int64_t{r} * weights.cols,
            columns.Of(first + r, room), weights.cols, count, scores.data(), &threshold);
      }
    }
  });
  Saliency sum;
  for (const Saliency& each : saliency) sum += each;
  return sum;
}

}  // namespace espalier
