// How much a weight counts: score[i, j] = W[i, j]^2 * c[j], where the metrics differ in c.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

// With x2[j] = sum_t X[t, j]^2 over calibration tokens, and S = sum_j x2[j]:
enum class Metric : uint8_t {
  // SwiftPrune (arXiv 2501.16376): w^2 / (1 - x2 / S). The published formula as third parties tell
  // it; that x is the layer's input, and S over its columns, is our definition, as is the clamp of
  // 1 - x2 / S at 1e-10. It is Optimal Brain Surgeon for the Hessian of one pooled input.
  kLScore,
  // Wanda (arXiv 2306.11695): (|w| * sqrt(x2))^2.
  kWanda,
  // RIA (Zhang et al., ICLR 2024): ((|w| / sum_i |w_ij| + |w| / sum_j |w_ij|) * sqrt(x2)^(1/2))^2.
  kRia,
  // Optimal Brain Damage with a damped diagonal, w^2 * (x2 + 0.01 * S / columns): our definition.
  kObdDamped,
  kMagnitude,  // w^2; looks at no input
  // w^2 * sum_t (X[t, j] - E[x_j])^2: what a row still loses where its mean is made up for
  // (mean_compensation.h). FLAP (arXiv 2312.11983) takes it of channels, as their fluctuation; of
  // single weights, and with the mean put into those that stay, is our definition.
  kFluctuation,
};
inline constexpr std::string_view kMetricNames[] = {"lscore",     "wanda",     "ria",
                                                    "obd_damped", "magnitude", "fluctuation"};

class ColumnWeights {
 public:
  // `squares`: x2, [columns of weights], of kFluctuation around the mean; of kMagnitude it may be
  // empty. Sums over W are made on the backend's workers if the metric has any.
  ColumnWeights(Metric metric, std::span<const float> squares, ConstMatrix weights,
                Backend* backend);

  // c of a row, [columns]; in `room` [columns] if it differs from row to row.
  const float* Of(int row, std::span<float> room) const;
  bool same_for_rows() const { return by_column_.empty(); }

 private:
  std::vector<float> columns_;
  std::vector<float> by_column_, by_row_;  // kRia: one over sums of |W|; else empty
};

}  // namespace espalier
