#include "engine/pruning/history.h"

#include <algorithm>

namespace espalier {

History::History(int layers, int columns, int exact_positions)
    : columns_(columns),
      exact_positions_(exact_positions),
      buckets_(exact_positions > 0 ? exact_positions + 1 : 7),
      energy_(layers, std::vector<float>(static_cast<size_t>(buckets_) * columns)),
      tokens_(layers, std::vector<int64_t>(buckets_)) {}

int History::BucketOf(int position) const {
  if (exact_positions_ > 0) return std::min(position, exact_positions_);
  int bucket = 0;
  for (int end = 1; position >= end && bucket < 6; end *= 4) ++bucket;
  return bucket;
}

void History::Learn(int layer, ConstMatrix hidden, std::span<const int> positions) {
  for (int r = 0; r < hidden.rows; ++r) {
    const int bucket = BucketOf(positions[r]);
    float* const energy = energy_[layer].data() + static_cast<size_t>(bucket) * columns_;
    const float share = 1.0f / static_cast<float>(++tokens_[layer][bucket]);
    const float* const h = hidden.row(r);
    for (int c = 0; c < columns_; ++c) energy[c] += (h[c] * h[c] - energy[c]) * share;
  }
}

void History::Update(int layer, ConstMatrix hidden, std::span<const int> positions,
                     std::span<const int32_t> columns, double keep) {
  for (int bucket = 0; bucket < buckets_; ++bucket) {
    sums_.assign(columns.size(), 0);
    int rows = 0;
    for (int r = 0; r < hidden.rows; ++r) {
      if (BucketOf(positions[r]) != bucket) continue;
      ++rows;
      const float* const h = hidden.row(r);
      for (size_t i = 0; i < columns.size(); ++i) sums_[i] += h[i] * h[i];
    }
    if (rows == 0) continue;
    float* const energy = energy_[layer].data() + static_cast<size_t>(bucket) * columns_;
    for (size_t i = 0; i < columns.size(); ++i) {
      float& value = energy[columns[i]];
      const float mean = sums_[i] / static_cast<float>(rows);
      value = value == 0 ? mean : static_cast<float>(keep * value + (1 - keep) * mean);
    }
  }
}

}  // namespace espalier
