// Sums over what meets the matrices of every layer, gathered while a model serves: what
// `espalier prune` needs to know of its inputs.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/model_config.h"
#include "engine/pruning/weights/column_moments.h"
#include "engine/pruning/weights/matrix_input.h"

namespace espalier {

class InputMoments {
 public:
  explicit InputMoments(const ModelConfig& config);

  int layers() const { return static_cast<int>(moments_.size() / kMatrixInputNames.size()); }
  // Of the input that was seen least.
  int64_t tokens() const;
  // While they are frozen nobody may add to them: whoever writes them to a file reads them
  // meanwhile.
  bool frozen() const { return frozen_; }
  void set_frozen(bool frozen) { frozen_ = frozen; }

  ColumnMoments& of(int layer, MatrixInput input) { return moments_[Index(layer, input)]; }
  const ColumnMoments& of(int layer, MatrixInput input) const {
    return moments_[Index(layer, input)];
  }

 private:
  static size_t Index(int layer, MatrixInput input) {
    return layer * kMatrixInputNames.size() + static_cast<size_t>(input);
  }

  std::vector<ColumnMoments> moments_;  // [layers, inputs]
  bool frozen_ = false;
};

// How many columns an input has.
int ColumnsOf(const ModelConfig& config, MatrixInput input);

}  // namespace espalier
