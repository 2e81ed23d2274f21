// Which pages hold the K and V of which sequence: tables that grow, are shared, and shrink where a
// sequence moves to a harder rung; and how many pages a rung takes.
//
//   pages(n tokens, rung) = ceil(n / tokens of a page at the rung) * layers that keep K and V there
//
// A page that all have read and nobody writes any more is shared through the prefix cache, by
// (rung, tokens up to its end). From a move on a sequence shares no page that it fills: its K and V
// are of several rungs. A cached page goes when a page is needed and none is free.
//
// The tables themselves lie in the sequences. Numbers only: whoever has the memory is told what to
// copy (PagePacking, the moves of SetLimit).
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "engine/scheduling/batch.h"
#include "engine/scheduling/page_pool.h"
#include "engine/scheduling/prefix_cache.h"
#include "engine/scheduling/sequence.h"
#include "policy/ladder.h"

namespace espalier {

// What the pool and the model can hold.
struct KvGeometry {
  int layers = 0;
  int pages = 0;         // of the whole pool, all layers
  int page_tokens = 16;  // twice as many at rungs of four bits
  int context = 0;       // longest sequence, tokens
};

class KvPages {
 public:
  // Crashes on a geometry out of range, or a ladder of another number of layers.
  KvPages(const KvGeometry& geometry, const Ladder& ladder, bool prefix_cache);

  const KvGeometry& geometry() const { return geometry_; }
  const PagePool& pool() const { return pool_; }
  uint64_t evicted() const { return cache_.evicted_pages(); }  // cached pages, since start

  // How many.
  int page_tokens(int rung) const { return rungs_[rung].page_tokens; }
  int layers(int rung) const { return static_cast<int>(rungs_[rung].layers.size()); }
  int TableLength(int64_t tokens, int rung) const;
  int64_t Pages(int64_t tokens, int rung) const {
    return int64_t{TableLength(tokens, rung)} * layers(rung);
  }
  // Of a whole request, prompt and output.
  int64_t Pages(const Request& request, int rung) const { return Pages(request.tokens(), rung); }
  int64_t PagesHeld(const Sequence& sequence) const {
    return int64_t{sequence.table_length} * layers(sequence.rung);
  }
  // That a running sequence may come to have in use if it never moves again: with shared ones of
  // layers that its rung has no K and V of, which stay in use until it ends.
  int64_t PagesAlone(const Sequence& sequence) const {
    const int64_t shared = static_cast<int64_t>(sequence.nodes.size());
    const int dropped = shared > 0 ? layers(sequence.node_rung) - layers(sequence.rung) : 0;
    return Pages(sequence.request, sequence.rung) + shared * dropped;
  }

  // Room for all of its tokens, so that nothing is allocated afterwards.
  void Reserve(Sequence* sequence) const;

  // Looks for what the sequence, which holds nothing, would compute first at the rung; of the pages
  // found, how many are in use. Its last token, and what it wants scores of, is not found.
  int64_t FindPrefix(const Sequence& sequence, int rung);
  // Gives it what FindPrefix, the last call before, found: it is at that rung, and computed as far
  // as that goes.
  void AdoptPrefix(Sequence* sequence, int rung);
  // Gives pages until its tables have `length`; so many must be available.
  void Grow(Sequence* sequence, int length);
  // Shares what is full and computed, in the prefix cache.
  void Share(Sequence* sequence);
  void Return(Sequence* sequence);  // all of its pages

  // True if the pages are there that a move needs, to a rung that keeps K and V of no more layers
  // and at no more bits.
  bool CanMove(const Sequence& sequence, int rung) const {
    return PagesToMove(sequence, rung) <= pool_.available();
  }
  // Pages of others that have to be copied, for they cannot be packed in place.
  int64_t PagesToMove(const Sequence& sequence, int rung) const;
  // The pages of layers that `rung` has no K and V of are free, but for shared ones, and two become
  // one where it has fewer bits: `packings` is added to, to be done before anything else is
  // computed.
  void Move(Sequence* sequence, int rung, std::vector<PagePacking>* packings);

  // Frees the page least recently used of those only cached; false if there is none.
  bool Evict() { return cache_.Evict(); }
  // From now on there may be so many pages; no more than that may be out. What lies beyond moves:
  // the pairs (from, to) of pages to copy. `running` are all that hold any.
  std::vector<std::pair<int32_t, int32_t>> SetLimit(int pages, std::span<Sequence* const> running);

  // Crashes unless free + used + cached = total in every layer, every page is free, of one of these
  // sequences or of one node of the prefix cache, whose users all computed what it holds, and
  // tables cover what is computed. O(pages + sequences * layers).
  void CheckInvariants(std::span<Sequence* const> running) const;

 private:
  struct RungPages {
    std::vector<int> layers;  // that keep K and V
    int page_tokens = 0;
    bool alike = true;  // decode rows are narrowed as prefill rows are
  };

  static std::vector<RungPages> PagesOfRungs(const KvGeometry& geometry, const Ladder& ladder);
  // At most so many nodes fit into the pool: each takes a page in every layer that keeps K and V.
  int MostNodes() const;
  bool Holds(int rung, int layer) const;
  std::span<const int32_t> PageTokens(const Sequence& sequence, int rung, int page) const;
  int32_t TakePage(int layer);  // a free page, or one of the prefix cache
  void Pack(Sequence* sequence, int rung, std::vector<PagePacking>* packings);

  const KvGeometry geometry_;
  const bool prefix_cache_;
  const std::vector<RungPages> rungs_;
  PagePool pool_;
  PrefixCache cache_;
  std::vector<int32_t> hits_;  // FindPrefix's
};

}  // namespace espalier
