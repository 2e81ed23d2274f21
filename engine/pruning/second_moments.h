// Second moments of what meets a layer's `down`, summed over the tokens of a calibration.
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
  // `backend` multiplies; it must outlive the sums, which take 4 * channels * (channels + outputs)
  // bytes.
  SecondMoments(int channels, int outputs, Backend* backend);

  // Adds the rows of hidden [rows, channels] and of what they miss, [rows, outputs], if there are
  // outputs. Rows of attention sinks are not among them.
  absl::Status Add(ConstMatrix hidden, ConstMatrix missed);

  // Adds such a row: position 0 of a text, and its like. All others attend to it, and some layer
  // gives it activations of a thousand times theirs (Sun et al., arXiv 2402.17762). Summed as it
  // is, least squares would serve little else; left out, they are free to spoil what they cannot
  // see. So their mean weighs as much as all other rows together where it is so large, and nothing
  // elsewhere.
  void AddSink(std::span<const float> hidden, std::span<const float> missed);

  int channels() const { return channels_; }
  int64_t tokens() const { return tokens_; }  // without sinks

  // E[h h^T], [channels, channels], and E[e h^T], [outputs, channels], and what sinks add. Zeros
  // before the first token.
  std::vector<float> Mean() const;
  std::vector<float> Missed() const;
  // Without sinks: E[h^2], [channels], E[h], [channels], and E[e], [outputs].
  std::vector<float> Energy() const;
  std::vector<float> FirstMoment() const;
  std::vector<float> MissedFirst() const;

 private:
  std::vector<float> MeanOf(std::span<const double> sums) const;
  // What sums of sinks, multiplied two by two, are to be multiplied by.
  double SinkWeight() const;

  // Rows of products done as one target: the lower triangle is a staircase.
  static constexpr int kStep = 192;

  int channels_, outputs_;
  Backend* backend_;
  std::vector<float> sums_;    // [channels, channels], the lower triangle
  std::vector<float> missed_;  // [outputs, channels]
  std::vector<double> first_;  // [channels + outputs]
  int64_t tokens_ = 0;
  std::vector<double> sink_;  // [channels + outputs], sums
  int64_t sinks_ = 0;
  std::vector<float> turned_;  // [channels + outputs, rows]
};

}  // namespace espalier
