// Which channels of a site stay, once the keep profile has said how many.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/channel_selection.h"
#include "policy/keep_profile.h"

namespace espalier {

class ChannelSelector {
 public:
  virtual ~ChannelSelector() = default;

  // The `count` channels (or heads) of a site that take part in this step. All of them if `count`
  // is the full width. The selection lives until the next step.
  virtual ChannelSelection Choose(int layer, SiteKind kind, int count) = 0;
};

// One fixed ranking per site: the first `count` of it stay. Natural order until one is set.
class StaticSelector final : public ChannelSelector {
 public:
  explicit StaticSelector(const SiteWidths& widths);

  // `ranking` is a permutation of [0, width of the site), best first. False, and nothing changed,
  // if it is not.
  bool SetRanking(int layer, SiteKind kind, std::vector<int32_t> ranking);

  ChannelSelection Choose(int layer, SiteKind kind, int count) override;

 private:
  std::vector<int32_t>& ranking(int layer, SiteKind kind) {
    return rankings_[2 * layer + static_cast<int>(kind)];
  }

  std::vector<std::vector<int32_t>> rankings_;  // [2 * layers]
};

}  // namespace espalier
