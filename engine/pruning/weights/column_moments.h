// What calibration tells of a matrix's input columns without a Hessian: sums, squares and, for
// blocks of columns, products.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

class ColumnMoments {
 public:
  // `blocks`: whether Block is wanted, at kMomentBlock times the work.
  ColumnMoments(int columns, bool blocks);

  // Adds the rows of x [rows, columns], one a token, on the backend's workers. Sums are of floats
  // within a call, of doubles between calls. Without blocks nothing is allocated.
  void Add(ConstMatrix x, Backend* backend);

  // What an earlier run summed, in place of what there is; each [columns]. Not with blocks.
  void Restore(int64_t tokens, std::span<const double> sums, std::span<const double> squares);
  std::span<const double> sums() const { return sums_; }
  std::span<const double> squares() const { return squares_; }

  int columns() const { return columns_; }
  int64_t tokens() const { return tokens_; }
  bool blocks() const { return !products_.empty(); }

  // Of the tokens, [columns]: sum_t x_tj^2 (not its mean, as the papers' formulas have it), the
  // same of x_tj - E[x_j], and E[x_j].
  std::vector<float> Squares() const;
  std::vector<float> SquaresAroundMean() const;
  std::vector<float> Mean() const;
  // E[x x^T] of columns [b * kMomentBlock, ...), as many as there are: [width, width].
  int block_count() const;
  int block_width(int b) const;
  std::vector<float> Block(int b) const;

 private:
  int columns_;
  int64_t tokens_ = 0;
  std::vector<double> sums_, squares_;  // [columns]
  std::vector<float> products_;         // [blocks, kMomentBlock, kMomentBlock]
};

}  // namespace espalier
