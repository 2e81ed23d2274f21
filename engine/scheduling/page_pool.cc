#include "engine/scheduling/page_pool.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "engine/scheduling/invariant.h"

namespace espalier {

PagePool::PagePool(int pages, int layers) {
  Invariant(pages >= 0 && layers > 0 && layers <= std::numeric_limits<int16_t>::max(),
            "a page pool of {} pages for {} layers", pages, layers);
  limit_ = pages;
  free_.resize(pages);
  std::iota(free_.rbegin(), free_.rend(), 0);
  layer_of_.assign(pages, -1);
  cached_.assign(pages, false);
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
    if (cached_[page]) Reuse(page);
    layer_of_[page] = -1;
    --used_by_layer_[layer];
    free_.push_back(page);
  }
}

void PagePool::Cache(int32_t page) {
  Invariant(layer_of_[page] >= 0 && !cached_[page], "page {} cached, but not in use", page);
  cached_[page] = true;
  ++cached_count_;
  --used_by_layer_[layer_of_[page]];
}

void PagePool::Reuse(int32_t page) {
  Invariant(cached_[page], "page {} reused, but not cached", page);
  cached_[page] = false;
  --cached_count_;
  ++used_by_layer_[layer_of_[page]];
}

void PagePool::SetLimit(int pages) {
  Invariant(pages >= 0 && pages <= static_cast<int>(layer_of_.size()), "{} pages of {}", pages,
            layer_of_.size());
  if (pages == limit_) return;
  for (int32_t page = pages; page < limit_; ++page) {
    Invariant(layer_of_[page] < 0, "page {} is out, and {} may be", page, pages);
  }
  std::erase_if(free_, [=](int32_t page) { return page >= pages; });
  // Below those that were there, so that they come last, in ascending order.
  std::vector<int32_t> more(std::max(0, pages - limit_));
  std::iota(more.rbegin(), more.rend(), limit_);
  free_.insert(free_.begin(), more.begin(), more.end());
  limit_ = pages;
}

std::vector<std::pair<int32_t, int32_t>> PagePool::Empty(int pages) {
  std::vector<std::pair<int32_t, int32_t>> moves;
  size_t next = 0;
  for (int32_t from = pages; from < limit_; ++from) {
    if (layer_of_[from] < 0) continue;
    while (next < free_.size() && free_[next] >= pages) ++next;
    Invariant(next < free_.size(), "no page below {} is free for page {}", pages, from);
    const int32_t to = std::exchange(free_[next++], from);
    layer_of_[to] = std::exchange(layer_of_[from], static_cast<int16_t>(-1));
    cached_[to] = cached_[from];
    cached_[from] = false;
    moves.emplace_back(from, to);
  }
  return moves;
}

void PagePool::CheckInvariants() const {
  std::vector<int> used(used_by_layer_.size(), 0);
  int idle = 0;
  for (int32_t page = 0; page < total(); ++page) {
    Invariant(layer_of_[page] >= 0 || !cached_[page], "page {} is free and cached", page);
    if (cached_[page]) {
      ++idle;
    } else if (layer_of_[page] >= 0) {
      ++used[layer_of_[page]];
    }
  }
  Invariant(used == used_by_layer_, "pages used by layer disagree with their counts");
  const int all_used = std::accumulate(used.begin(), used.end(), 0);
  Invariant(idle == cached() && all_used == this->used(),
            "free {} + used {} + cached {} pages are not the {} there are", free(), all_used, idle,
            total());
  std::vector<bool> seen(layer_of_.size(), false);
  for (const int32_t page : free_) {
    Invariant(page < total() && layer_of_[page] == -1 && !seen[page],
              "page {} is free twice, or free and held", page);
    seen[page] = true;
  }
}

}  // namespace espalier
