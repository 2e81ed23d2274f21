// Second moments of what meets the `down` of every layer, summed while a model serves: what
// `espalier calibrate --moments` ranks channels and refits `down` by.
//
// SecondMoments sums the same of one layer, for a calibration; these are of all layers, take few
// rows at a time, and allocate nothing once they are made.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "engine/pruning/sink_sums.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace espalier {

class ChannelMoments {
 public:
  // Channels that a tile of products has on either side.
  static constexpr int kTile = 64;
  // Rows that are added at once, at most.
  static constexpr int kMostRows = 128;
  // Rows in a layer's sums, at most: then all of them are halved, so that what is added still
  // counts in 24 bits, and traffic of long ago counts less.
  static constexpr int64_t kMostTokens = int64_t{1} << 22;

  struct Layer {
    int64_t tokens = 0;
    std::vector<double> sums;  // [channels]: sum of h
    // [tiles, kTile, kTile]: sum of h h^T, tile (a, b), b <= a, at a * (a + 1) / 2 + b. The lower
    // triangle counts: of tiles on the diagonal, what lies above is the same once more; channels
    // that fill up the last tile are zero.
    std::vector<float> products;
    SinkSums sinks;  // [channels]
  };

  ChannelMoments(int layers, int channels);
  // What its sums take: 147 MB for 30 layers of 1536.
  static uint64_t Bytes(int layers, int channels) {
    return uint64_t{2} * layers * channels * (channels + kTile);
  }

  // Adds the listed rows of hidden [rows, channels], one a token, the first kMostRows of them, on
  // the backend's workers, and as sinks the `first` ones, at position 0 of texts. Listed ones of
  // many times the median's energy are sinks, too: a text may begin with a token three times. Rows
  // that are not finite are left out.
  void Add(int layer, ConstMatrix hidden, std::span<const int> rows, std::span<const int> first,
           Backend* backend);

  int layers() const { return static_cast<int>(layers_.size()); }
  int channels() const { return channels_; }
  // Tiles of a layer: a lower triangle of them.
  int tiles() const { return blocks_ * (blocks_ + 1) / 2; }
  Layer& layer(int layer) { return layers_[layer]; }
  const Layer& layer(int layer) const { return layers_[layer]; }
  // The first of those that were seen least, and how many rows of it.
  int least_layer() const;
  int64_t tokens() const { return layers_[least_layer()].tokens; }
  // How often rows were added: whether there is anything new.
  int64_t additions() const { return additions_; }

  // Sum of h_i h_j.
  float Product(int layer, int i, int j) const;
  // E[h h^T], [channels, channels], with what sinks add; E[h^2], [channels], and E[h], [channels],
  // without. Zeros before the first token.
  std::vector<float> Mean(int layer) const;
  std::vector<float> Energy(int layer) const;
  std::vector<float> FirstMoment(int layer) const;

  // As InputMoments.
  bool frozen() const { return frozen_; }
  void set_frozen(bool frozen) { frozen_ = frozen; }

 private:
  int channels_, blocks_;
  std::vector<Layer> layers_;
  std::vector<float> rows_;  // [blocks, kMostRows, kTile]: those in hand, as tiles want them
  std::vector<std::pair<double, int>> energies_;  // [kMostRows], of those listed
  std::vector<int> counted_;                      // that are no sinks
  int64_t additions_ = 0;
  bool frozen_ = false;
};

}  // namespace espalier
