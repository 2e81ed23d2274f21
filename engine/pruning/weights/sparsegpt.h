// SparseGPT (Frantar & Alistarh, arXiv 2301.00774), the baseline with a whole Hessian: columns are
// pruned from left to right, each one's error taken over by those right of it.
//
// As its reference: H = E[x x^T] with 0.01 of the mean of its diagonal added, blocks of 128
// columns, score w^2 / U_jj^2; without groups the threshold is shared by all rows of a block of
// columns. Scale of H changes nothing. Faster than the reference by design: matrices that share an
// input share a factor, and the factor takes half the work (factor.h).
#pragma once

#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/pruning/weights/pattern.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

inline constexpr double kSparseGptDamping = 0.01;

// Prunes and updates `weights` [outputs, columns] in place. `factor`: [columns, columns], what
// ToInverseFactor makes of H with kSparseGptDamping.
absl::Status SparseGpt(const Pattern& pattern, std::span<const float> factor, Matrix weights,
                       Backend* backend);

}  // namespace espalier
