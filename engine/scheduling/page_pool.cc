#include "engine/scheduling/page_pool.h"

#include <limits>
#include <numeric>

#include "engine/scheduling/invariant.h"

namespace espalier {

PagePool::PagePool(int pages, int layers) {
  Invariant(pages >= 0 && layers > 0 && layers <= std::numeric_limits<int16_t>::max(),
            "a page pool of {} pages for {} layers", pages, layers);
  free_.resize(pages);
  std::iota(free_.rbegin(), free_.rend(), 0);
  layer_of_.assign(pages, -1);
  used_by_layer_.assign(layers, 0);
}

int32_t PagePool::Take(int layer) {
  if (free_.empty()) return -1;
  const int32_t page = free_.back();
  free_.pop_back();
  layer_of_[page] = static_cast<int16_t>(layer);
  ++used_by_layer_[layer];
  return page;
}

void PagePool::Return(int layer, std::span<const int32_t> pages) {
  for (const int32_t page : pages) {
    Invariant(page >= 0 && page < total(), "page {} returned, the pool has {}", page, total());
    Invariant(layer_of_[page] == layer, "page {} returned by layer {}, held by {} (-1 = free)",
              page, layer, layer_of_[page]);
    layer_of_[page] = -1;
    --used_by_layer_[layer];
    free_.push_back(page);
  }
}

void PagePool::CheckInvariants() const {
  std::vector<int> held(used_by_layer_.size(), 0);
  for (const int layer : layer_of_) {
    if (layer >= 0) ++held[layer];
  }
  Invariant(held == used_by_layer_, "pages held by layer disagree with their counts");
  Invariant(std::accumulate(held.begin(), held.end(), 0) == used(),
            "free {} + used {} + cached {} pages are not the {} there are", free(),
            std::accumulate(held.begin(), held.end(), 0), cached(), total());
  std::vector<bool> seen(layer_of_.size(), false);
  for (const int32_t page : free_) {
    Invariant(layer_of_[page] == -1 && !seen[page], "page {} is free twice, or free and held",
              page);
    seen[page] = true;
  }
}

}  // namespace espalier
