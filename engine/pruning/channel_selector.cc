#include "engine/pruning/channel_selector.h"

#include <numeric>
#include <utility>

namespace espalier {

StaticSelector::StaticSelector(const SiteWidths& widths) : rankings_(2 * widths.layers) {
  for (int layer = 0; layer < widths.layers; ++layer) {
    for (SiteKind kind : {SiteKind::kHeads, SiteKind::kChannels}) {
      std::vector<int32_t>& natural = rankings_[Index(layer, kind)];
      natural.resize(kind == SiteKind::kHeads ? widths.heads : widths.channels);
      std::iota(natural.begin(), natural.end(), 0);
    }
  }
}

bool StaticSelector::SetRanking(int layer, SiteKind kind, std::vector<int32_t> order) {
  std::vector<int32_t>& current = rankings_[Index(layer, kind)];
  if (order.size() != current.size()) return false;
  std::vector<bool> seen(order.size(), false);
  for (int32_t channel : order) {
    if (channel < 0 || channel >= static_cast<int32_t>(order.size()) || seen[channel]) return false;
    seen[channel] = true;
  }
  current = std::move(order);
  return true;
}

}  // namespace espalier
