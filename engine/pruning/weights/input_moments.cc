#include "engine/pruning/weights/input_moments.h"

#include <algorithm>

namespace espalier {

InputMoments::InputMoments(const ModelConfig& config) {
  moments_.reserve(config.layers * kMatrixInputNames.size());
  for (int layer = 0; layer < config.layers; ++layer) {
    for (size_t input = 0; input < kMatrixInputNames.size(); ++input) {
      moments_.emplace_back(ColumnsOf(config, static_cast<MatrixInput>(input)), /*blocks=*/false);
    }
  }
}

int64_t InputMoments::tokens() const {
  if (moments_.empty()) return 0;
  return std::ranges::min_element(moments_, {}, &ColumnMoments::tokens)->tokens();
}

int ColumnsOf(const ModelConfig& config, MatrixInput input) {
  switch (input) {
    case MatrixInput::kO:
      return config.heads * config.head_dim;
    case MatrixInput::kDown:
      return config.channels;
    default:
      return config.hidden;
  }
}

}  // namespace espalier
