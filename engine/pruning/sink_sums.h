// What attention sinks hold, summed beside the second moments of other rows: position 0 of a text,
// and its like.
//
// All other rows attend to a sink, and some layer gives it activations of a thousand times theirs
// (Sun et al., arXiv 2402.17762). Summed like any row, least squares would serve little else. Left
// out, `down` is free to spoil what it cannot see: SmolLM2-135M with a fifth of its channels left
// out lost 1.45 nats a token where that happened, 0.44 where sinks counted a tenth of the other
// rows, and 0.31 where they counted as much (tests/bench/pruning/README.md). So their mean does,
// where it is so large, and nothing elsewhere. One mean is one direction: of one kind of sinks.
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace espalier {

struct SinkSums {
  std::vector<double> sums;  // [values of a row]
  int64_t rows = 0;

  // A row in two parts, the second of which may be empty.
  void Add(std::span<const float> channels, std::span<const float> outputs = {}) {
    for (size_t i = 0; i < channels.size(); ++i) sums[i] += channels[i];
    for (size_t i = 0; i < outputs.size(); ++i) sums[channels.size() + i] += outputs[i];
    ++rows;
  }

  // What products of two sums are multiplied by, to stand beside means of products: by E[h^2] of
  // the other rows, [channels], and as many sums.
  double Weight(std::span<const float> energies) const {
    constexpr double kLarge = 100;  // SmolLM2-135M's hold 300, 200,000 and 10,000 in three layers
    const auto end = sums.begin() + static_cast<int64_t>(energies.size());
    const double squares = std::inner_product(sums.begin(), end, sums.begin(), 0.0);
    const double energy = std::accumulate(energies.begin(), energies.end(), 0.0);
    const auto count = static_cast<double>(rows);
    const bool large = squares > kLarge * energy * count * count;
    return rows > 0 && large ? energy / squares : 0;
  }
};

}  // namespace espalier
