#include "engine/pruning/second_moments.h"

#include <algorithm>

namespace espalier {

SecondMoments::SecondMoments(int channels, int outputs, Backend* backend)
    : channels_(channels),
      outputs_(outputs),
      backend_(backend),
      sums_(static_cast<size_t>(channels) * channels),
      missed_(static_cast<size_t>(outputs) * channels),
      first_(channels + outputs),
      sinks_{.sums = std::vector<double>(channels + outputs)} {}

absl::Status SecondMoments::Add(ConstMatrix hidden, ConstMatrix missed) {
  const int rows = hidden.rows;
  if (rows == 0) return absl::OkStatus();
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < channels_; ++c) first_[c] += hidden.row(r)[c];
    for (int n = 0; n < outputs_; ++n) first_[channels_ + n] += missed.row(r)[n];
  }
  turned_.resize(static_cast<size_t>(channels_ + outputs_) * rows);
  const Matrix turned(turned_.data(), channels_, rows);
  const Matrix turned_missed(turned_.data() + static_cast<int64_t>(channels_) * rows, outputs_,
                             rows);
  const auto turn = [&](const ConstMatrix& from, const Matrix& to) {
    constexpr int kTile = 16;  // a cache line of values
    backend_->ParallelFor((from.cols + kTile - 1) / kTile, [&](int tile) {
      const int begin = tile * kTile, end = std::min(begin + kTile, from.cols);
      for (int r = 0; r < rows; ++r) {
        for (int c = begin; c < end; ++c) to.row(c)[r] = from.row(r)[c];
      }
    });
  };
  turn(hidden, turned);
  const absl::StatusOr<Weight> weight = backend_->UploadWeight(
      WeightType::kF32, WeightLayout::kOutputRows, channels_, rows,
      {.read_values = [&](int c, float* dst) { std::copy_n(turned.row(c), rows, dst); }});
  if (!weight.ok()) return weight.status();
  std::vector<MatMulTarget> targets;
  for (int first = 0; first < channels_; first += kStep) {
    const int step = std::min(kStep, channels_ - first);
    targets.push_back({.weight = &*weight,
                       .out = Matrix(sums_.data() + static_cast<int64_t>(first) * channels_, step,
                                     first + step, channels_),
                       .first_row = first,
                       .channels = first + step});
  }
  backend_->MatMul({.x = turned, .targets = targets, .output = MatMulArgs::Output::kAdd});
  if (outputs_ > 0) {
    turn(missed, turned_missed);
    const MatMulTarget target[] = {
        {.weight = &*weight, .out = Matrix(missed_.data(), outputs_, channels_)}};
    backend_->MatMul({.x = turned_missed, .targets = target, .output = MatMulArgs::Output::kAdd});
  }
  tokens_ += rows;
  return backend_->Synchronize();
}

std::vector<float> SecondMoments::Energy() const {
  std::vector<float> energy(channels_);
  for (int c = 0; tokens_ > 0 && c < channels_; ++c) {
    energy[c] = sums_[static_cast<size_t>(c) * (channels_ + 1)] / static_cast<float>(tokens_);
  }
  return energy;
}

std::vector<float> SecondMoments::FirstMoment() const {
  return MeanOf(std::span(first_).first(channels_));
}

std::vector<float> SecondMoments::MissedFirst() const {
  return MeanOf(std::span(first_).subspan(channels_));
}

std::vector<float> SecondMoments::MeanOf(std::span<const double> sums) const {
  const double scale = tokens_ == 0 ? 0 : 1.0 / static_cast<double>(tokens_);
  std::vector<float> mean;
  for (const double sum : sums) mean.push_back(static_cast<float>(sum * scale));
  return mean;
}

std::vector<float> SecondMoments::Mean() const {
  const size_t width = channels_;
  std::vector<float> mean(width * width);
  if (tokens_ == 0) return mean;
  const double scale = 1.0 / static_cast<double>(tokens_), sinks = sinks_.Weight(Energy());
  for (size_t i = 0; i < width; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      mean[i * width + j] = mean[j * width + i] = static_cast<float>(
          sums_[i * width + j] * scale + sinks * sinks_.sums[i] * sinks_.sums[j]);
    }
  }
  return mean;
}

std::vector<float> SecondMoments::Missed() const {
  const size_t width = channels_;
  std::vector<float> mean(missed_.size());
  if (tokens_ == 0) return mean;
  const double scale = 1.0 / static_cast<double>(tokens_), sinks = sinks_.Weight(Energy());
  for (int n = 0; n < outputs_; ++n) {
    for (size_t c = 0; c < width; ++c) {
      mean[n * width + c] = static_cast<float>(missed_[n * width + c] * scale +
                                               sinks * sinks_.sums[width + n] * sinks_.sums[c]);
    }
  }
  return mean;
}

}  // namespace espalier
