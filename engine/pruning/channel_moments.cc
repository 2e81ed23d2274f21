#include "engine/pruning/channel_moments.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "engine/pruning/weights/loops.h"

namespace espalier {

static_assert(ChannelMoments::kTile == kMomentBlock);

ChannelMoments::ChannelMoments(int layers, int channels)
    : channels_(channels),
      blocks_((channels + kTile - 1) / kTile),
      layers_(layers),
      rows_(static_cast<size_t>(blocks_) * kMostRows * kTile) {
  for (Layer& layer : layers_) {
    layer.sums.resize(channels);
    layer.products.resize(static_cast<size_t>(tiles()) * kTile * kTile);
    layer.sinks.sums.resize(channels);
  }
  energies_.reserve(kMostRows);
  counted_.reserve(kMostRows);
}

void ChannelMoments::Add(int layer, ConstMatrix hidden, std::span<const int> listed,
                         std::span<const int> first, Backend* backend) {
  Layer& to = layers_[layer];
  const auto of = [&](int row) { return std::span(hidden.row(row), channels_); };
  const auto energy = [&](int row) {
    const std::span<const float> h = of(row);
    return std::inner_product(h.begin(), h.end(), h.begin(), 0.0);
  };
  ++additions_;
  for (const int row : first) {
    if (std::isfinite(energy(row))) to.sinks.Add(of(row));
  }
  // Ordinary rows of SmolLM2-135M hold up to 65 times the median, sinks 300 in one layer, 10,000
  // and more in two.
  constexpr double kSinkEnergy = 200;
  listed = listed.first(std::min<size_t>(listed.size(), kMostRows));
  energies_.resize(listed.size());
  const auto measure = [&](int i) { energies_[i] = {energy(listed[i]), listed[i]}; };
  backend->ParallelFor(static_cast<int>(listed.size()), std::cref(measure));
  std::erase_if(energies_, [](const auto& of) { return !std::isfinite(of.first); });
  if (energies_.empty()) return;
  const auto middle = energies_.begin() + static_cast<int64_t>(energies_.size() / 2);
  std::ranges::nth_element(energies_, middle);
  const double most = kSinkEnergy * middle->first;
  counted_.clear();
  for (const auto& [squares, row] : energies_) {
    if (squares > most) {
      to.sinks.Add(of(row));
    } else {
      counted_.push_back(row);
    }
  }
  std::ranges::sort(counted_);
  const std::span<const int> rows = counted_;
  const int count = static_cast<int>(rows.size());
  const auto block = [this](int b) { return rows_.data() + int64_t{b} * kMostRows * kTile; };
  const auto take = [&](int b) {
    const int begin = b * kTile, width = std::min(kTile, channels_ - begin);
    float sums[kTile] = {};
    for (int r = 0; r < count; ++r) {
      const float* const from = hidden.row(rows[r]) + begin;
      float* const row = block(b) + r * kTile;
      for (int j = 0; j < width; ++j) {
        row[j] = from[j];
        sums[j] += from[j];
      }
    }
    for (int j = 0; j < width; ++j) to.sums[begin + j] += sums[j];
  };
  backend->ParallelFor(blocks_, std::cref(take));  // a function of its own would be allocated
  const WeightLoops& loops = BestWeightLoops();
  // A task is a row of tiles, the longest first.
  const auto multiply = [&](int task) {
    const int a = blocks_ - 1 - task;
    float* tile = to.products.data() + int64_t{a} * (a + 1) / 2 * kTile * kTile;
    for (int b = 0; b <= a; ++b, tile += kTile * kTile) {
      loops.add_block(block(a), block(b), kTile, count, tile);
    }
  };
  backend->ParallelFor(blocks_, std::cref(multiply));
  to.tokens += count;
  if (to.tokens < kMostTokens) return;
  to.tokens /= 2;
  to.sinks.rows /= 2;
  for (double& sum : to.sums) sum /= 2;
  for (double& sum : to.sinks.sums) sum /= 2;
  for (float& product : to.products) product /= 2;
}

int ChannelMoments::least_layer() const {
  return static_cast<int>(std::ranges::min_element(layers_, {}, &Layer::tokens) - layers_.begin());
}

float ChannelMoments::Product(int layer, int i, int j) const {
  if (i < j) std::swap(i, j);
  const int64_t a = i / kTile, b = j / kTile;
  return layers_[layer].products[((a * (a + 1) / 2 + b) * kTile + i % kTile) * kTile + j % kTile];
}

std::vector<float> ChannelMoments::Mean(int layer) const {
  const auto width = static_cast<size_t>(channels_);
  std::vector<float> mean(width * width);
  const double scale = 1.0 / static_cast<double>(std::max<int64_t>(layers_[layer].tokens, 1));
  const std::vector<double>& sinks = layers_[layer].sinks.sums;
  const double weight = layers_[layer].sinks.Weight(Energy(layer));
  for (int i = 0; i < channels_; ++i) {
    for (int j = 0; j <= i; ++j) {
      mean[i * width + j] = mean[j * width + i] =
          static_cast<float>(Product(layer, i, j) * scale + weight * sinks[i] * sinks[j]);
    }
  }
  return mean;
}

std::vector<float> ChannelMoments::Energy(int layer) const {
  const double scale = 1.0 / static_cast<double>(std::max<int64_t>(layers_[layer].tokens, 1));
  std::vector<float> energy;
  for (int i = 0; i < channels_; ++i) {
    energy.push_back(static_cast<float>(Product(layer, i, i) * scale));
  }
  return energy;
}

std::vector<float> ChannelMoments::FirstMoment(int layer) const {
  const double scale = 1.0 / static_cast<double>(std::max<int64_t>(layers_[layer].tokens, 1));
  std::vector<float> mean;
  for (const double sum : layers_[layer].sums) mean.push_back(static_cast<float>(sum * scale));
  return mean;
}

}  // namespace espalier
