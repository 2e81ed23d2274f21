#include "engine/pruning/weights/metric.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace espalier {
namespace {

constexpr double kLeastShare = 1e-10;  // of 1 - x2 / S
constexpr double kDamping = 0.01;      // of the mean of x2, as SparseGPT's

float OneOver(double sum) { return sum > 0 ? static_cast<float>(1 / sum) : 0; }

}  // namespace

ColumnWeights::ColumnWeights(Metric metric, std::span<const float> squares, ConstMatrix weights,
                             Backend* backend)
    : columns_(weights.cols, 1.0f) {
  if (metric == Metric::kMagnitude) return;
  const double sum = std::accumulate(squares.begin(), squares.end(), 0.0);
  const double damping = kDamping * sum / std::max(weights.cols, 1);
  for (int j = 0; j < weights.cols; ++j) {
    double weight = squares[j];
    if (metric == Metric::kLScore) {
      weight = sum > 0 ? 1 / std::max(1 - squares[j] / sum, kLeastShare) : 1;
    }
    if (metric == Metric::kRia) weight = std::sqrt(squares[j]);
    if (metric == Metric::kObdDamped) weight = squares[j] + damping;
    columns_[j] = static_cast<float>(weight);
  }
  if (metric != Metric::kRia) return;
  by_row_.resize(weights.rows);
  backend->ParallelFor(weights.rows, [&](int i) {
    const float* const row = weights.row(i);
    by_row_[i] = OneOver(std::accumulate(row, row + weights.cols, 0.0,
                                         [](double all, float w) { return all + std::abs(w); }));
  });
  std::vector<double> sums(weights.cols);
  for (int i = 0; i < weights.rows; ++i) {
    for (int j = 0; j < weights.cols; ++j) sums[j] += std::abs(weights.row(i)[j]);
  }
  for (const double each : sums) by_column_.push_back(OneOver(each));
}

const float* ColumnWeights::Of(int row, std::span<float> room) const {
  if (by_column_.empty()) return columns_.data();
  for (size_t j = 0; j < columns_.size(); ++j) {
    const float relative = by_column_[j] + by_row_[row];
    room[j] = relative * relative * columns_[j];
  }
  return room.data();
}

}  // namespace espalier
