#include "engine/pruning/second_moments.h"

#include <algorithm>

namespace espalier {

SecondMoments::SecondMoments(int layers, int channels, Backend* backend)
    : channels_(channels), backend_(backend), sums_(layers), first_(layers), tokens_(layers) {}

absl::Status SecondMoments::Add(int layer, ConstMatrix hidden) {
  if (hidden.rows == 0) return absl::OkStatus();
  std::vector<float>& sum = sums_[layer];
  sum.resize(static_cast<size_t>(channels_) * channels_);
  turned_.resize(static_cast<size_t>(channels_) * hidden.rows);
  first_[layer].resize(channels_);
  for (int r = 0; r < hidden.rows; ++r) {
    for (int c = 0; c < channels_; ++c) first_[layer][c] += hidden.row(r)[c];
  }
  const Matrix turned(turned_.data(), channels_, hidden.rows);
  constexpr int kTile = 16;  // a cache line of values
  backend_->ParallelFor((channels_ + kTile - 1) / kTile, [&](int tile) {
    const int begin = tile * kTile, end = std::min(begin + kTile, channels_);
    for (int r = 0; r < hidden.rows; ++r) {
      for (int c = begin; c < end; ++c) turned.row(c)[r] = hidden.row(r)[c];
    }
  });
  const absl::StatusOr<Weight> weight = backend_->UploadWeight(
      WeightType::kF32, WeightLayout::kOutputRows, channels_, hidden.rows,
      {.read_values = [&](int c, float* dst) { std::copy_n(turned.row(c), hidden.rows, dst); }});
  if (!weight.ok()) return weight.status();
  std::vector<MatMulTarget> targets;
  for (int first = 0; first < channels_; first += kStep) {
    const int rows = std::min(kStep, channels_ - first);
    targets.push_back({.weight = &*weight,
                       .out = Matrix(sum.data() + static_cast<int64_t>(first) * channels_, rows,
                                     first + rows, channels_),
                       .first_row = first,
                       .channels = first + rows});
  }
  backend_->MatMul({.x = turned, .targets = targets, .output = MatMulArgs::Output::kAdd});
  tokens_[layer] += hidden.rows;
  return backend_->Synchronize();
}

std::vector<float> SecondMoments::Energy(int layer) const {
  std::vector<float> energy(channels_);
  for (int c = 0; tokens_[layer] > 0 && c < channels_; ++c) {
    energy[c] =
        sums_[layer][static_cast<size_t>(c) * (channels_ + 1)] / static_cast<float>(tokens_[layer]);
  }
  return energy;
}

std::vector<float> SecondMoments::FirstMoment(int layer) const {
  std::vector<float> mean(channels_);
  for (int c = 0; tokens_[layer] > 0 && c < channels_; ++c) {
    mean[c] = static_cast<float>(first_[layer][c] / static_cast<double>(tokens_[layer]));
  }
  return mean;
}

std::vector<float> SecondMoments::Mean(int layer) const {
  const size_t width = channels_;
  std::vector<float> mean(width * width);
  if (tokens_[layer] == 0) return mean;
  const double scale = 1.0 / static_cast<double>(tokens_[layer]);
  for (size_t i = 0; i < width; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      mean[i * width + j] = mean[j * width + i] =
          static_cast<float>(sums_[layer][i * width + j] * scale);
    }
  }
  return mean;
}

}  // namespace espalier
