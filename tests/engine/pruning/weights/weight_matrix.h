// Made-up weights and inputs for the tests of weight pruning.
#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/tensor.h"

namespace espalier {

struct WeightMatrix {
  WeightMatrix(int rows, int columns, int seed)
      : values(rows * columns), rows(rows), cols(columns) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 0.05f);
    for (float& value : values) value = normal(random);
  }
  Matrix view() { return {values.data(), rows, cols}; }
  float at(int row, int col) const { return values[static_cast<size_t>(row) * cols + col]; }

  std::vector<float> values;
  int rows, cols;
};

// Inputs [tokens, columns] that are mixtures of fewer sources about means of their own, with a few
// columns many times larger: as activations are.
inline WeightMatrix Inputs(int tokens, int columns, int seed) {
  const int sources = columns / 3 + 1;
  WeightMatrix x(tokens, columns, seed), mix(sources, columns, seed + 1),
      mean(1, columns, seed + 2);
  WeightMatrix drawn(tokens, sources, seed + 3);
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < columns; ++j) {
      double sum = x.at(t, j) + 10 * mean.at(0, j);
      for (int s = 0; s < sources; ++s) sum += 100 * drawn.at(t, s) * mix.at(s, j);
      x.values[static_cast<size_t>(t) * columns + j] =
          static_cast<float>(j % 17 == 5 ? 8 * sum : sum);
    }
  }
  return x;
}

inline std::unique_ptr<Backend> TwoThreads() { return CreateCpuBackend({.threads = 2}).value(); }

// sum_t |(W - W') x_t|^2
inline double OutputError(const WeightMatrix& dense, const WeightMatrix& pruned,
                          const WeightMatrix& x) {
  double error = 0;
  for (int t = 0; t < x.rows; ++t) {
    for (int i = 0; i < dense.rows; ++i) {
      double off = 0;
      for (int j = 0; j < dense.cols; ++j) off += (dense.at(i, j) - pruned.at(i, j)) * x.at(t, j);
      error += off * off;
    }
  }
  return error;
}

}  // namespace espalier
