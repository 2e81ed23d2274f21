// What MLP channels, or heads' columns, were worth so far: a running mean of their squares, by
// layer and position.
//
// Probe Pruning (arXiv 2502.15618) keeps one for every position. Buckets of positions need a
// thousandth of that, and go on beyond the longest text seen; position 0 is alone, because its
// activations are many times those of others.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/tensor.h"

namespace espalier {

class History {
 public:
  // `exact_positions` > 0: a bucket for each position below it, the last for all beyond; else the
  // buckets {0}, {1 .. 3}, {4 .. 15}, {16 .. 63}, {64 .. 255}, {256 .. 1023}, {1024 ..}.
  History(int layers, int columns, int exact_positions = 0);

  int layers() const { return static_cast<int>(energy_.size()); }
  int columns() const { return columns_; }
  int buckets() const { return buckets_; }
  int BucketOf(int position) const;

  // Mean of h^2 of a bucket's tokens, [columns]; zeros before the first.
  std::span<const float> Energy(int layer, int bucket) const {
    return std::span(energy_[layer]).subspan(static_cast<size_t>(bucket) * columns_, columns_);
  }

  // Of all buckets, [buckets, columns].
  std::span<const float> Energies(int layer) const { return energy_[layer]; }

  // Sets them as Energies gave them, in place of what was there.
  void Restore(int layer, std::span<const float> energies) {
    energy_[layer].assign(energies.begin(), energies.end());
  }

  // Takes dense rows into the means: hidden [rows, columns] at positions [rows].
  void Learn(int layer, ConstMatrix hidden, std::span<const int> positions);

  // V = keep V + (1 - keep) mean of h^2, for the columns listed, of which hidden [rows, listed]
  // holds the values, in the buckets that have rows; the mean itself where V is zero yet. Others
  // keep their value.
  void Update(int layer, ConstMatrix hidden, std::span<const int> positions,
              std::span<const int32_t> columns, double keep);

 private:
  int columns_;
  int exact_positions_;
  int buckets_;
  std::vector<std::vector<float>> energy_;    // [layers][buckets * columns]
  std::vector<std::vector<int64_t>> tokens_;  // [layers][buckets]
  std::vector<float> sums_;                   // of an update
};

}  // namespace espalier
