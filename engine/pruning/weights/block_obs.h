// `--quality`: Optimal Brain Surgeon with a Hessian of blocks on its diagonal, between scores alone
// and SparseGPT in time and in what it keeps.
//
// SparseGPT's mask and update (arXiv 2301.00774), but columns of different blocks of 64 are taken
// to be independent: moments cost 64 multiplications a value in place of `columns`, a factor 64^3 a
// block in place of columns^3, and no row waits for another. Our definition.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "engine/pruning/weights/column_moments.h"
#include "engine/pruning/weights/pattern.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

class BlockObs {
 public:
  // Factors the blocks of `moments`, which must have them; for all matrices that share an input.
  // `centred`: of covariances, for MeanCompensation to follow: what weights add by the inputs'
  // means is its business, over blocks (perplexity at 2:4 is 4 % less). InvalidArgument if a block
  // is not finite.
  static absl::StatusOr<BlockObs> Create(const ColumnMoments& moments, bool centred,
                                         Backend* backend);

  // Prunes and updates `weights` [outputs, columns] in place. Without groups each row loses exactly
  // its share, by w^2 / U_jj^2.
  void Prune(const Pattern& pattern, Matrix weights, Backend* backend) const;

 private:
  explicit BlockObs(int columns) : columns_(columns) {}

  int columns_;
  std::vector<float> factors_;         // [blocks, kMomentBlock, kObsWidth]
  std::vector<float> column_weights_;  // [columns]: 1 / U_jj^2
};

}  // namespace espalier
