// The numbering of KV pages: which are free, used or cached, and by which layer. Never their
// memory.
//
// One pool serves all layers: a page holds 16 tokens of one layer of one sequence, so pages that a
// dropped attention block gives back serve every other layer and sequence.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace espalier {

class PagePool {
 public:
  // Free = never taken, or returned; cached = kept for reuse, with no user. Crashes unless
  // pages >= 0 and 0 < layers < 32,768.
  PagePool(int pages, int layers);

  // Pages there may be: [0, total()). All of them at first.
  int total() const { return limit_; }
  int free() const { return static_cast<int>(free_.size()); }
  int used() const { return total() - free() - cached(); }
  int cached() const { return cached_count_; }
  int available() const { return free() + cached(); }  // a cached page goes when it is asked for
  int used_by(int layer) const { return used_by_layer_[layer]; }

  // The layer that holds `page`, or -1 if it is free.
  int layer_of(int32_t page) const { return layer_of_[page]; }
  bool cached(int32_t page) const { return cached_[page]; }

  // Takes one page for `layer`; -1 if none is free. The last one returned comes first (its lines
  // may still be in a cache), fresh ones in ascending order.
  int32_t Take(int layer);

  // Frees pages, used or cached. Crashes if one of them is not out for `layer`.
  void Return(int layer, std::span<const int32_t> pages);

  // A used page becomes a cached one of the same layer, and back. Crashes if it is not.
  void Cache(int32_t page);
  void Reuse(int32_t page);

  // From now on there may be so many pages, at most those of the start: those from there on must
  // be free, or Empty them before.
  void SetLimit(int pages);
  // What is out beyond the first `pages` gets a free page among those. The pairs (from, to): who
  // holds `from` holds `to` now. Crashes if there are too few free ones.
  std::vector<std::pair<int32_t, int32_t>> Empty(int pages);

  // Crashes unless every page is free, or used or cached by one layer, and the counts agree.
  void CheckInvariants() const;

 private:
  int limit_ = 0;
  std::vector<int32_t> free_;      // a stack
  std::vector<int16_t> layer_of_;  // [pages], -1 = free
  std::vector<bool> cached_;       // [pages]
  int cached_count_ = 0;
  std::vector<int> used_by_layer_;  // [layers]
};

}  // namespace espalier
