// Which channels of a site stay, once the keep profile has said how many, what those that stay are
// multiplied by, and what of keys need not be kept.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/weight.h"
#include "policy/keep_profile.h"

namespace espalier {

// What makes up for the channels of a layer that left: of one set of them, and no other.
struct Refit {
  // `down` fitted anew to those kept: groups [hidden, count / kQuantGroup] in the order of the
  // ranking. Empty: its rows as loaded.
  std::span<const FourBitGroup> down;
  std::span<const float> bias;  // [hidden], added to what `down` gives. Empty: none
};

// The same with memory of its own.
struct RefittedDown {
  std::vector<FourBitGroup> down;
  std::vector<float> bias;
};

class ChannelSelector {
 public:
  virtual ~ChannelSelector() = default;

  // A permutation of the channels (or heads) of a site, best first: of `count` that are kept, its
  // first `count` are. Lives until the next call that changes rankings.
  virtual std::span<const int32_t> Ranking(int layer, SiteKind kind) const = 0;

  // For the first `count` channels of a layer's ranking.
  virtual Refit RefitOf(int /*layer*/, int /*count*/) const { return {}; }

  // [kv_heads * head_dim]: what a layer's rotated keys are on the mean, and four bits leave out;
  // empty: not known.
  virtual std::span<const float> KeyMean(int /*layer*/) const { return {}; }
};

// One fixed ranking per site. Natural order until one is set.
class StaticSelector final : public ChannelSelector {
 public:
  explicit StaticSelector(const SiteWidths& widths);

  // `ranking` is a permutation of [0, width of the site), best first. False, and nothing changed,
  // if it is not.
  bool SetRanking(int layer, SiteKind kind, std::vector<int32_t> ranking);

  std::span<const int32_t> Ranking(int layer, SiteKind kind) const override {
    return rankings_[Index(layer, kind)];
  }

 private:
  static int Index(int layer, SiteKind kind) { return 2 * layer + static_cast<int>(kind); }

  std::vector<std::vector<int32_t>> rankings_;  // [2 * layers]
};

}  // namespace espalier
