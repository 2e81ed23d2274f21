#include "engine/pruning/weights/mean_compensation.h"

#include <algorithm>
#include <numeric>

#include "engine/pruning/weights/loops.h"

namespace espalier {
namespace {

constexpr double kDamping = 0.01;  // of the mean of E[x^2], added to variances
constexpr int kTaskRows = 32;

void OverRows(int rows, Backend* backend, const std::function<void(int)>& fn) {
  backend->ParallelFor((rows + kTaskRows - 1) / kTaskRows, [&](int task) {
    for (int r = task * kTaskRows; r < std::min((task + 1) * kTaskRows, rows); ++r) fn(r);
  });
}

}  // namespace

MeanCompensation::MeanCompensation(const ColumnMoments& moments, ConstMatrix weights,
                                   Backend* backend)
    : mean_(moments.Mean()), whole_(weights.rows) {
  const std::vector<float> squares = moments.Squares();
  const double tokens = std::max<double>(1, static_cast<double>(moments.tokens()));
  const double damping = kDamping * std::accumulate(squares.begin(), squares.end(), 0.0) / tokens /
                         std::max<double>(1, static_cast<double>(squares.size()));
  for (size_t j = 0; j < mean_.size(); ++j) {
    const double mean = mean_[j];
    const double variance = std::max(squares[j] / tokens - mean * mean, 0.0) + damping;
    direction_.push_back(variance > 0 ? static_cast<float>(mean / variance) : 0);
    pull_.push_back(static_cast<float>(mean * direction_.back()));
  }
  const WeightLoops& loops = BestWeightLoops();
  OverRows(weights.rows, backend,
           [&](int r) { whole_[r] = loops.dot(weights.row(r), mean_.data(), weights.cols); });
}

void MeanCompensation::Apply(Matrix weights, Backend* backend) const {
  const WeightLoops& loops = BestWeightLoops();
  OverRows(weights.rows, backend, [&](int r) {
    float* const row = weights.row(r);
    const double lost = whole_[r] - loops.dot(row, mean_.data(), weights.cols);
    const double pull = loops.sum_kept(row, pull_.data(), weights.cols);
    loops.add_kept(row, direction_.data(), static_cast<float>(lost / (1 + pull)), weights.cols);
  });
}

}  // namespace espalier
