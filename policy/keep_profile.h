// How many channels of each site stay: the one representation of all pruning.
//
// A site is a place where a layer can be narrowed: the attention heads or the MLP channels of one
// layer. Full count = dense; zero = the block is dropped (RAP); in between = structured pruning
// (Probe Pruning). Which channels stay is not said here; that is the ranking's business.
#pragma once

#include <cstdint>
#include <vector>

namespace espalier {

enum class SiteKind : uint8_t {
  kHeads,     // query heads of one layer's attention
  kChannels,  // hidden channels of one layer's MLP
};
inline constexpr int kSiteKinds = 2;

// Full widths of a model's sites: what "dense" means for it.
struct SiteWidths {
  int layers = 0;
  int heads = 0;     // query heads per layer
  int channels = 0;  // MLP hidden channels per layer

  int of(SiteKind kind) const { return kind == SiteKind::kHeads ? heads : channels; }
  bool operator==(const SiteWidths&) const = default;
};

class KeepProfile {
 public:
  // Everything kept.
  static KeepProfile Dense(const SiteWidths& widths);

  const SiteWidths& widths() const { return widths_; }

  // Kept count of one site, in [0, full width]. `layer` in [0, layers).
  int kept(int layer, SiteKind kind) const {
    return kind == SiteKind::kHeads ? heads_[layer] : channels_[layer];
  }

  // Narrows one site. `count` is clamped to [0, full width].
  void Keep(int layer, SiteKind kind, int count);

  bool dense() const;
  // Some of a site stays, but not all; of a site nothing does: its block is dropped.
  bool narrows() const;
  bool drops() const;

  // Share of heads and channels that left, each site weighted by its width: 0 for dense, 1 for
  // everything dropped.
  double prune_ratio() const;

  // True if no site keeps more here than in `other`: rungs of a ladder are nested so.
  bool NestedIn(const KeepProfile& other) const;

  bool operator==(const KeepProfile&) const = default;

 private:
  SiteWidths widths_;
  std::vector<int> heads_;     // [layers]
  std::vector<int> channels_;  // [layers]
};

}  // namespace espalier
