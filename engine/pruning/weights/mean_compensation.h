// Makes up for what pruned weights added on average, within the weights that stay: linear in their
// number, and no bias that a model file would have to hold.
//
// A row loses e = sum over its pruned j of w_j E[x_j]. FLAP (arXiv 2312.11983) adds such an e as a
// bias. Llama files have no biases, so here the kept weights carry it (our definition): with the
// inputs' Hessian modelled as diag(v) + m m^T, m = E[x] and v the variances, Optimal Brain Surgeon
// over all pruned weights at once gives each kept weight
//   delta_j = (m_j / v_j) * e / (1 + sum over kept of m_j^2 / v_j),
// by Sherman-Morrison: the rank-one model of SwiftPrune's own metric, with a diagonal.
#pragma once

#include <span>
#include <vector>

#include "engine/pruning/weights/column_moments.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

class MeanCompensation {
 public:
  // Keeps what the rows of `weights` [outputs, columns], not pruned yet, give for the mean input.
  MeanCompensation(const ColumnMoments& moments, ConstMatrix weights, Backend* backend);

  // Corrects the rows' weights that are not 0 after pruning.
  void Apply(Matrix weights, Backend* backend) const;

 private:
  std::vector<float> mean_;       // [columns]
  std::vector<float> direction_;  // [columns]: m / v
  std::vector<float> pull_;       // [columns]: m^2 / v
  std::vector<double> whole_;     // [outputs]
};

}  // namespace espalier
