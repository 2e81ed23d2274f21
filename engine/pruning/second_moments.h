// Second moments of what meets a layer's `down`, summed over the tokens of a calibration.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/pruning/sink_sums.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

class SecondMoments {
 public:
  // `backend` multiplies; it must outlive the sums, which take 4 * channels * (channels + outputs)
  // bytes.
  SecondMoments(int channels, int outputs, Backend* backend);

  // Adds the rows of hidden [rows, channels] and of what they miss, [rows, outputs], if there are
  // outputs. Rows of attention sinks are not among them.
  absl::Status Add(ConstMatrix hidden, ConstMatrix missed);

  // Adds a row of theirs, hidden [channels] and missed [outputs].
  void AddSink(std::span<const float> hidden, std::span<const float> missed) {
    sinks_.Add(hidden, missed);
  }

  int channels() const { return channels_; }
  int64_t tokens() const { return tokens_; }  // without sinks

  // E[h h^T], [channels, channels], and E[e h^T], [outputs, channels], and what sinks add
  // (sink_sums.h). Zeros before the first token.
  std::vector<float> Mean() const;
  std::vector<float> Missed() const;
  // Without sinks: E[h^2], [channels], E[h], [channels], and E[e], [outputs].
  std::vector<float> Energy() const;
  std::vector<float> FirstMoment() const;
  std::vector<float> MissedFirst() const;

 private:
  std::vector<float> MeanOf(std::span<const double> sums) const;

  // Rows of products done as one target: the lower triangle is a staircase.
  static constexpr int kStep = 192;

  int channels_, outputs_;
  Backend* backend_;
  std::vector<float> sums_;    // [channels, channels], the lower triangle
  std::vector<float> missed_;  // [outputs, channels]
  std::vector<double> first_;  // [channels + outputs]
  int64_t tokens_ = 0;
  SinkSums sinks_;             // [channels + outputs]
  std::vector<float> turned_;  // [channels + outputs, rows]
};

}  // namespace espalier
