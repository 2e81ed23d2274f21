#include "engine/pruning/weights/factor.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/tensor.h"

namespace espalier {
namespace {

constexpr int kBlock = 64;

// Cholesky from the last row up of a block on the diagonal: A = R R^T in place, R upper, zeros
// below; then R^-1 into `inverse` [width, width]. False if A is not positive definite.
bool FactorBlock(float* a, int64_t stride, int width, double* inverse) {
  double r[kBlock][kBlock] = {};
  for (int j = width - 1; j >= 0; --j) {
    double diagonal = a[j * stride + j];
    for (int k = j + 1; k < width; ++k) diagonal -= r[j][k] * r[j][k];
    if (!(diagonal > 0) || !std::isfinite(diagonal)) return false;
    r[j][j] = std::sqrt(diagonal);
    for (int i = 0; i < j; ++i) {
      double sum = a[i * stride + j];
      for (int k = j + 1; k < width; ++k) sum -= r[i][k] * r[j][k];
      r[i][j] = sum / r[j][j];
    }
  }
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) a[i * stride + j] = static_cast<float>(r[i][j]);
  }
  std::fill_n(inverse, width * width, 0.0);
  for (int j = 0; j < width; ++j) {  // column j of R^-1, from its diagonal up
    inverse[j * width + j] = 1 / r[j][j];
    for (int i = j - 1; i >= 0; --i) {
      double sum = 0;
      for (int k = i + 1; k <= j; ++k) sum += r[i][k] * inverse[k * width + j];
      inverse[i * width + j] = -sum / r[i][i];
    }
  }
  return true;
}

// out (+)= x * values, of values [depth, cols] given transposed: row c are its column c.
absl::Status Multiply(ConstMatrix x, int cols, const std::function<void(int, float*)>& column,
                      MatMulArgs::Output output, Matrix out, Backend* backend) {
  if (x.rows == 0 || cols == 0) return absl::OkStatus();
  const absl::StatusOr<Weight> weight = backend->UploadWeight(
      WeightType::kF32, WeightLayout::kOutputRows, cols, x.cols, {.read_values = column});
  if (!weight.ok()) return weight.status();
  const MatMulTarget target[] = {{.weight = &*weight, .out = out}};
  backend->MatMul({.x = x, .targets = target, .output = output});
  return backend->Synchronize();
}

}  // namespace

bool ToSmallInverseFactor(int n, double damping, const float* matrix, int64_t stride,
                          float* factor) {
  std::vector<float> damped(matrix, matrix + n * n);
  for (int i = 0; i < n; ++i) {
    if (damped[i * n + i] == 0) {
      for (int j = 0; j < n; ++j) damped[i * n + j] = damped[j * n + i] = 0;
      damped[i * n + i] = 1;
    }
    damped[i * n + i] += static_cast<float>(damping);
  }
  double inverse[kBlock * kBlock];
  if (!FactorBlock(damped.data(), n, n, inverse)) return false;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      factor[i * stride + j] = static_cast<float>(inverse[i * n + j]);
    }
  }
  return true;
}

absl::Status ToInverseFactor(int n, double damping, Backend* backend, std::vector<float>* matrix) {
  float* const a = matrix->data();
  const auto at = [&](int row, int col) { return a + int64_t{row} * n + col; };
  double mean = 0;
  for (int i = 0; i < n; ++i) mean += *at(i, i) / static_cast<double>(n);
  for (int i = 0; i < n; ++i) {
    if (*at(i, i) == 0) {
      for (int j = 0; j < n; ++j) *at(i, j) = *at(j, i) = 0;
      *at(i, i) = 1;
    }
    *at(i, i) += static_cast<float>(damping * mean);
  }
  const int blocks = (n + kBlock - 1) / kBlock;
  const auto width_of = [&](int b) { return std::min(kBlock, n - b * kBlock); };
  std::vector<double> inverses(static_cast<size_t>(blocks) * kBlock * kBlock);  // R_bb^-1
  std::vector<float> room;
  // Right-looking from the last block: R_bb, then R_ib of the blocks above, then what they take
  // from the matrix to their left and above.
  for (int b = blocks - 1; b >= 0; --b) {
    const int begin = b * kBlock, width = width_of(b);
    double* const inverse = inverses.data() + int64_t{b} * kBlock * kBlock;
    if (!FactorBlock(at(begin, begin), n, width, inverse)) {
      return absl::InvalidArgumentError(fmt::format(
          "second moments of columns {} to {}: expected a positive definite matrix, got none",
          begin, begin + width - 1));
    }
    // R_ib = A_ib R_bb^-T
    room.resize(static_cast<size_t>(begin) * width);
    const Matrix panel(room.data(), begin, width);
    absl::Status status = Multiply(
        ConstMatrix(at(0, begin), begin, width, n), width,
        [&](int c, float* dst) {
          for (int k = 0; k < width; ++k) dst[k] = static_cast<float>(inverse[c * width + k]);
        },
        MatMulArgs::Output::kOverwrite, panel, backend);
    if (!status.ok()) return status;
    for (int i = 0; i < begin; ++i) std::copy_n(panel.row(i), width, at(i, begin));
    // A_ij -= R_ib R_jb^T, i <= j: a staircase of the upper triangle.
    if (begin == 0) continue;
    const absl::StatusOr<Weight> weight =
        backend->UploadWeight(WeightType::kF32, WeightLayout::kOutputRows, begin, width,
                              {.read_values = [&](int c, float* dst) {
                                for (int k = 0; k < width; ++k) dst[k] = -panel.row(c)[k];
                              }});
    if (!weight.ok()) return weight.status();
    // Symmetric, so that the lower triangle serves: row i up to column i, by steps of rows.
    constexpr int kStep = 192;
    std::vector<MatMulTarget> targets;
    for (int first = 0; first < begin; first += kStep) {
      const int step = std::min(kStep, begin - first);
      targets.push_back({.weight = &*weight,
                         .out = Matrix(at(first, 0), step, first + step, n),
                         .first_row = first,
                         .channels = first + step});
    }
    backend->MatMul({.x = panel, .targets = targets, .output = MatMulArgs::Output::kAdd});
    status = backend->Synchronize();
    if (!status.ok()) return status;
    // The next panel is read from above the diagonal.
    const int next = begin - std::min(kBlock, begin);
    for (int i = 0; i < begin; ++i) {
      for (int j = std::max(next, i + 1); j < begin; ++j) *at(i, j) = *at(j, i);
    }
  }
  // U = R^-1 by columns of blocks, from the last: U_jj = R_jj^-1, and above it
  // U_{0..j, j} = -U_{0..j, 0..j} R_{0..j, j} U_jj, of the U to the left, so from the first.
  for (int b = 0; b < blocks; ++b) {
    const int begin = b * kBlock, width = width_of(b);
    const double* const inverse = inverses.data() + int64_t{b} * kBlock * kBlock;
    if (begin > 0) {
      // P = R_{0..j, j} U_jj
      room.resize(static_cast<size_t>(begin) * width);
      const Matrix product(room.data(), begin, width);
      absl::Status status = Multiply(
          ConstMatrix(at(0, begin), begin, width, n), width,
          [&](int c, float* dst) {
            for (int k = 0; k < width; ++k) dst[k] = static_cast<float>(-inverse[k * width + c]);
          },
          MatMulArgs::Output::kOverwrite, product, backend);
      if (!status.ok()) return status;
      std::vector<float> above(static_cast<size_t>(begin) * width);
      const Matrix out(above.data(), begin, width);
      // U's rows are zero left of the diagonal, which products of the staircase's steps leave out.
      constexpr int kStep = 256;
      for (int first = 0; first < begin; first += kStep) {
        const int step = std::min(kStep, begin - first), depth = begin - first;
        status = Multiply(
            ConstMatrix(at(first, first), step, depth, n), width,
            [&](int c, float* dst) {
              for (int k = 0; k < depth; ++k) dst[k] = product.row(first + k)[c];
            },
            MatMulArgs::Output::kOverwrite,
            Matrix(above.data() + int64_t{first} * width, step, width), backend);
        if (!status.ok()) return status;
      }
      for (int i = 0; i < begin; ++i) std::copy_n(out.row(i), width, at(i, begin));
    }
    for (int i = 0; i < width; ++i) {
      std::fill_n(at(begin + i, 0), begin, 0.0f);
      for (int j = 0; j < width; ++j) {
        *at(begin + i, begin + j) = static_cast<float>(inverse[i * width + j]);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace espalier
