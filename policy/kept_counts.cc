#include "policy/kept_counts.h"

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

// The whole part of a product of decimals: 0.29 * 100 is 29.
int Whole(double value) { return static_cast<int>(value + 1e-9); }

}  // namespace

double NarrowedLayerRatio(int layers, int dense, double ratio) {
  const double exact = static_cast<double>(layers) / (layers - dense) * ratio;
  return std::clamp(std::nearbyint(exact * 100) / 100, 0.0, 1.0);
}

int KeptHeads(int heads, double layer_ratio) { return heads - Whole(layer_ratio * heads); }

int KeptChannels(int channels, double layer_ratio, int multiple) {
  const int kept = channels - Whole(layer_ratio * channels);
  return std::min((kept + multiple - 1) / multiple * multiple, channels);
}

}  // namespace espalier
