// The numbering of KV pages: which are free, which are used and by which layer. Never their memory.
//
// One pool serves all layers: a page holds 16 tokens of one layer of one sequence, so pages that a
// dropped attention block gives back serve every other layer and sequence.
#pragma once

#include <cstdint>
#include <vector>

namespace espalier {

class PagePool {
 public:
  PagePool(int pages, int layers);

  int total() const { return total_; }
  int free() const { return static_cast<int>(free_.size()); }
  int used() const { return total_ - free() - cached(); }
  int cached() const { return 0; }  // reusable pages of finished sequences: with the prefix cache
  int used_by(int layer) const { return used_by_layer_[layer]; }

  // Takes one page for `layer`; -1 if none is free. Lowest-numbered-last-freed order, deterministic.
  int32_t Take(int layer);

  // Gives pages back. Crashes if a page is not out (a broken invariant of ours).
  void Return(int layer, const std::vector<int32_t>& pages);

 private:
  int total_;
  std::vector<int32_t> free_;
  std::vector<int> used_by_layer_;
  std::vector<int16_t> owner_layer_;  // [pages], -1 = free
};

}  // namespace espalier
