#include "engine/pruning/weights/mask.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace espalier {
namespace {

// Rows of a task: whole EWMA passes, and enough that a threshold found for one row serves the next.
constexpr int kTaskRows = 2 * kEwmaRows;
// Rows that k is calibrated on; a sample of 64 is within 0.3 % of the share.
constexpr int kSampleRows = 64;

uint32_t BitsOf(float value) { return std::bit_cast<uint32_t>(value); }
float FloatOf(uint32_t bits) { return std::bit_cast<float>(bits); }

// Scores in [low, high), of which there are `below(low)` and `below(high)` below each end.
struct Bracket {
  float low = 0, high = 0;
  int64_t below_low = 0, below_high = 0;
};

// The `count` least of [low, high) by comparing each with each; there are few.
void ZeroFew(float* weights, const float* scores, int64_t n, const Bracket& in, int64_t count,
             Saliency* saliency) {
  std::vector<int64_t> found;
  found.reserve(in.below_high - in.below_low);
  for (int64_t j = 0; j < n; ++j) {
    if (scores[j] >= in.low && scores[j] < in.high) found.push_back(j);
  }
  for (size_t i = 0; i < found.size(); ++i) {
    int64_t before = 0;
    for (size_t o = 0; o < found.size(); ++o) {
      const float mine = scores[found[i]], other = scores[found[o]];
      before += (other < mine || (other == mine && o < i)) ? 1 : 0;
    }
    if (before >= count) continue;
    weights[found[i]] = 0;
    saliency->kept -= scores[found[i]];
  }
}

// The first `count` whose score is exactly `value`.
void ZeroEqual(float* weights, const float* scores, int64_t n, float value, int64_t count,
               Saliency* saliency) {
  for (int64_t j = 0; j < n && count > 0; ++j) {
    if (scores[j] != value) continue;
    weights[j] = 0;
    saliency->kept -= value;
    --count;
  }
}

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
  std::vector<float> sample;
  sample.reserve(static_cast<size_t>(rows) * weights.cols);
  for (int pass = 0; pass < passes; ++pass) {
    const int count = std::min(step, rows - pass * step);
    for (int j = 0; j < weights.cols; ++j) {
      const float* const column = standing.data() + pass * pass_values + int64_t{j} * kEwmaRows;
      sample.insert(sample.end(), column, column + count);
    }
  }
  const int64_t at = options.pattern.PrunedOf(static_cast<int64_t>(sample.size()));
  std::ranges::nth_element(sample, sample.begin() + std::min<int64_t>(at, sample.size() - 1));
  return sample[std::min<int64_t>(at, sample.size() - 1)];
}

// Of a row that EWMA pruned: `original` is the row as it was, `scores` its own.
void Repair(float* weights, std::span<const float> original, std::span<float> scores, int64_t count,
            float* threshold) {
  const auto n = static_cast<int64_t>(original.size());
  // Weights of 0 are pruned either way.
  const int64_t pruned = BestWeightLoops().zeros(weights, n);
  const bool too_many = pruned > count;
  for (int64_t j = 0; j < n; ++j) {  // those that are not in question are out of reach
    if ((weights[j] == 0) != too_many) scores[j] = std::numeric_limits<float>::infinity();
    if (too_many) weights[j] = original[j];
  }
  ZeroLeast(weights, scores.data(), n, too_many ? count : count - pruned, threshold);
}

}  // namespace

Saliency ZeroLeast(float* weights, const float* scores, int64_t n, int64_t count,
                   float* threshold) {
  const WeightLoops& loops = BestWeightLoops();
  constexpr int64_t kFew = 32;
  const float infinity = std::numeric_limits<float>::infinity();
  Bracket in{.low = 0, .high = infinity, .below_low = 0, .below_high = n};
  if (count >= n) {
    Saliency saliency = loops.zero_below(weights, scores, n, 0);
    std::fill_n(weights, n, 0.0f);
    saliency.kept = 0;
    return saliency;
  }
  float next = *threshold > 0 && *threshold < infinity ? *threshold : 0;
  if (next == 0) {
    double sum = 0;
    for (int64_t j = 0; j < std::min<int64_t>(n, 64); ++j) sum += scores[j];
    next = static_cast<float>(sum / static_cast<double>(std::min<int64_t>(n, 64)));
  }
  for (int turn = 0; in.below_low != count && in.below_high != count; ++turn) {
    if (in.high < infinity && in.below_high - in.below_low <= kFew) break;
    const uint32_t low = BitsOf(in.low), high = BitsOf(in.high);
    if (high - low <= 1) break;  // all that is left are equal
    if (!(next > in.low && next < in.high) || turn % 4 == 3) next = FloatOf(low + (high - low) / 2);
    const int64_t below = loops.count_below(scores, n, next);
    (below <= count ? in.low : in.high) = next;
    (below <= count ? in.below_low : in.below_high) = below;
    // Near its median |w| is spread evenly, so counts go with roots of scores. A few more or less,
    // so that the other end comes near too.
    const double margin = (below <= count ? 0.4 : -0.4) * kFew;
    const double aim = static_cast<double>(count) + margin;
    if (in.high < infinity && in.low > 0) {
      const double share = (aim - static_cast<double>(in.below_low)) /
                           static_cast<double>(in.below_high - in.below_low);
      const double a = std::sqrt(in.low), b = std::sqrt(in.high);
      const double root = a + std::clamp(share, 0.02, 0.98) * (b - a);
      next = static_cast<float>(root * root);
    } else if (below > 0) {
      const double ratio = std::clamp(aim / static_cast<double>(below), 0.25, 4.0);
      next = static_cast<float>(next * ratio * ratio);
    } else {
      next = 0;  // bisect
    }
  }
  if (in.below_high == count) {
    in.low = in.high;
    in.below_low = count;
  }
  *threshold = in.low;
  Saliency saliency = loops.zero_below(weights, scores, n, in.low);
  if (in.below_low == count) return saliency;
  if (in.high < infinity && in.below_high - in.below_low <= kFew) {
    ZeroFew(weights, scores, n, in, count - in.below_low, &saliency);
  } else {
    ZeroEqual(weights, scores, n, in.low, count - in.below_low, &saliency);
  }
  return saliency;
}

Saliency MaskRow(const Pattern& pattern, float* weights, const float* column_weights, int columns,
                 float* threshold) {
  if (pattern.grouped()) return MaskGroupedRow(pattern, weights, column_weights, columns);
  std::vector<float> scores(columns);
  BestWeightLoops().score(weights, column_weights, columns, scores.data());
  return ZeroLeast(weights, scores.data(), columns, pattern.PrunedOf(columns), threshold);
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
        ZeroLeast(flat.data(), scores.data(), n, options.pattern.PrunedOf(n), &threshold);
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
          saliency[task] += ZeroLeast(w, scores.data(), weights.cols, count, &threshold);
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
      saliency[task].all += kept.all;
      if (!options.strict) saliency[task].kept += kept.kept;
      for (int r = 0; options.strict && r < rows; ++r) {
        const auto before =
            std::span<const float>(original).subspan(int64_t{r} * weights.cols, weights.cols);
        const float* const c = columns.Of(first + r, room);
        loops.score(before.data(), c, weights.cols, scores.data());
        Repair(weights.row(first + r), before, scores, count, &threshold);
        loops.score(weights.row(first + r), c, weights.cols, scores.data());
        saliency[task].kept += std::accumulate(scores.begin(), scores.end(), 0.0);
      }
    }
  });
  Saliency sum;
  for (const Saliency& each : saliency) sum += each;
  return sum;
}

}  // namespace espalier
