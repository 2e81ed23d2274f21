// Second moments of MLP channels, summed over the tokens of a calibration.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

class SecondMoments {
 public:
  // `backend` multiplies; it must outlive the sums. They take 4 * layers * channels^2 bytes.
  SecondMoments(int layers, int channels, Backend* backend);

  // Adds the rows of hidden [rows, channels]. Leave out position 0 of texts: its activations are
  // many times those of others, and least squares would serve little else.
  absl::Status Add(int layer, ConstMatrix hidden);

  int64_t tokens(int layer) const { return tokens_[layer]; }
  int channels() const { return channels_; }

  // E[h h^T], [channels, channels]. Zeros before the first token.
  std::vector<float> Mean(int layer) const;
  // E[h^2] and E[h], [channels].
  std::vector<float> Energy(int layer) const;
  std::vector<float> FirstMoment(int layer) const;

 private:
  // Rows of products done as one target: the lower triangle is a staircase.
  static constexpr int kStep = 192;

  int channels_;
  Backend* backend_;
  std::vector<std::vector<float>> sums_;    // [layers][channels * channels], the lower triangle
  std::vector<std::vector<double>> first_;  // [layers][channels]
  std::vector<int64_t> tokens_;             // [layers]
  std::vector<float> turned_;               // [channels, rows]
};

}  // namespace espalier
