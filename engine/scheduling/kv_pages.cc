#include "engine/scheduling/kv_pages.h"

#include <algorithm>
#include <numeric>

#include "engine/scheduling/invariant.h"

namespace espalier {

KvPages::KvPages(const KvGeometry& geometry, const Ladder& ladder, bool prefix_cache)
    : geometry_(geometry),
      prefix_cache_(prefix_cache),
      rungs_(PagesOfRungs(geometry, ladder)),
      pool_(geometry.pages, geometry.layers),
      cache_(prefix_cache ? MostNodes() : 0, geometry.layers, 2 * geometry.page_tokens, &pool_) {
  hits_.reserve(cache_.capacity());
}

std::vector<KvPages::RungPages> KvPages::PagesOfRungs(const KvGeometry& geometry,
                                                      const Ladder& ladder) {
  Invariant(geometry.page_tokens >= 1 && geometry.context >= 1,
            "KV geometry: pages of {} tokens, context of {}", geometry.page_tokens,
            geometry.context);
  Invariant(ladder.size() >= 1, "a ladder without rungs");
  std::vector<RungPages> rungs;
  for (int i = 0; i < ladder.size(); ++i) {
    const Rung& rung = ladder.rung(i);
    Invariant(rung.prefill.widths().layers == geometry.layers,
              "rung {} has {} layers, the KV pool {}", i, rung.prefill.widths().layers,
              geometry.layers);
    RungPages& pages = rungs.emplace_back();
    for (int layer = 0; layer < geometry.layers; ++layer) {
      if (rung.HoldsKv(layer)) pages.layers.push_back(layer);
    }
    pages.page_tokens = geometry.page_tokens * (rung.int4_kv ? 2 : 1);
    pages.alike = rung.prefill == rung.decode;
  }
  return rungs;
}

int KvPages::MostNodes() const {
  int fewest = geometry_.layers;
  for (int rung = 0; rung < static_cast<int>(rungs_.size()); ++rung) {
    if (layers(rung) > 0) fewest = std::min(fewest, layers(rung));
  }
  return geometry_.pages / fewest;
}

int KvPages::TableLength(int64_t tokens, int rung) const {
  return static_cast<int>((tokens + page_tokens(rung) - 1) / page_tokens(rung));
}

void KvPages::Reserve(Sequence* sequence) const {
  const int longest = TableLength(sequence->request.tokens(), 0);
  for (std::vector<int32_t>& table : sequence->page_tables) table.reserve(longest);
  if (prefix_cache_) sequence->nodes.reserve(longest);
}

int64_t KvPages::FindPrefix(const Sequence& sequence, int rung) {
  hits_.clear();
  if (!prefix_cache_ || layers(rung) == 0) return 0;
  int reusable = sequence.size() - 1;
  if (sequence.request.prompt_logprobs && sequence.scored + 1 < sequence.prompt_tokens()) {
    reusable = sequence.scored;
  }
  int64_t in_use = 0;
  int32_t node = PrefixCache::kNone;
  for (int page = 0; (page + 1) * page_tokens(rung) <= reusable; ++page) {
    node = cache_.Find(rung, node, PageTokens(sequence, rung, page));
    if (node == PrefixCache::kNone) break;
    hits_.push_back(node);
    if (cache_.users(node) > 0) in_use += layers(rung);
  }
  return in_use;
}

void KvPages::AdoptPrefix(Sequence* sequence, int rung) {
  sequence->rung = rung;
  sequence->node_rung = rung;
  sequence->moved = false;
  for (const int32_t node : hits_) {
    cache_.Use(node);
    sequence->nodes.push_back(node);
    for (const int layer : rungs_[rung].layers) {
      sequence->page_tables[layer].push_back(cache_.pages(node)[layer]);
    }
  }
  sequence->table_length = static_cast<int>(hits_.size());
  sequence->computed = sequence->table_length * page_tokens(rung);
}

void KvPages::Grow(Sequence* sequence, int length) {
  for (; sequence->table_length < length; ++sequence->table_length) {
    for (const int layer : rungs_[sequence->rung].layers) {
      sequence->page_tables[layer].push_back(TakePage(layer));
    }
  }
}

int32_t KvPages::TakePage(int layer) {
  int32_t page = pool_.Take(layer);
  if (page < 0 && cache_.Evict()) page = pool_.Take(layer);
  Invariant(page >= 0, "no page left for layer {}", layer);
  return page;
}

void KvPages::Share(Sequence* sequence) {
  const int rung = sequence->rung;
  if (!prefix_cache_ || layers(rung) == 0 || sequence->moved) return;
  // Where decode rows are narrowed otherwise, their K and V are not what a prefill would find.
  const int shared =
      rungs_[rung].alike ? sequence->computed : std::min(sequence->computed, sequence->prefilled);
  std::vector<int32_t>& nodes = sequence->nodes;
  for (int page = static_cast<int>(nodes.size()); (page + 1) * page_tokens(rung) <= shared;
       ++page) {
    const int32_t parent = nodes.empty() ? PrefixCache::kNone : nodes.back();
    const std::span<const int32_t> tokens = PageTokens(*sequence, rung, page);
    int32_t node = cache_.Find(rung, parent, tokens);
    if (node == PrefixCache::kNone) {
      node = cache_.Insert(rung, parent, tokens, sequence->page_tables, page);
    } else {
      cache_.Use(node);
      for (const int layer : rungs_[rung].layers) {
        int32_t& own = sequence->page_tables[layer][page];
        pool_.Return(layer, std::span(&own, 1));
        own = cache_.pages(node)[layer];
      }
    }
    nodes.push_back(node);
  }
}

void KvPages::Return(Sequence* sequence) {
  std::vector<int32_t>& nodes = sequence->nodes;
  for (const int layer : rungs_[sequence->rung].layers) {
    pool_.Return(layer, std::span(sequence->page_tables[layer]).subspan(nodes.size()));
    sequence->page_tables[layer].clear();
  }
  for (; !nodes.empty(); nodes.pop_back()) cache_.Release(nodes.back());
  sequence->table_length = 0;
}

int64_t KvPages::PagesToMove(const Sequence& sequence, int rung) const {
  if (page_tokens(rung) == page_tokens(sequence.rung)) return 0;
  const int shared = static_cast<int>(sequence.nodes.size());
  const int copies = shared == sequence.table_length ? (shared + 1) / 2 : shared / 2;
  return int64_t{copies} * layers(rung);
}

void KvPages::Move(Sequence* sequence, int rung, std::vector<PagePacking>* packings) {
  for (const int layer : rungs_[sequence->rung].layers) {
    if (Holds(rung, layer)) continue;
    std::vector<int32_t>& table = sequence->page_tables[layer];
    pool_.Return(layer, std::span(table).subspan(sequence->nodes.size()));
    table.clear();
  }
  if (page_tokens(rung) != page_tokens(sequence->rung)) Pack(sequence, rung, packings);
  sequence->rung = rung;
  sequence->moved = true;
}

// Two shared pages stay what they are to others, and a page more is taken.
void KvPages::Pack(Sequence* sequence, int rung, std::vector<PagePacking>* packings) {
  const int shared = static_cast<int>(sequence->nodes.size());
  const int before = sequence->table_length, after = (before + 1) / 2;
  const int computed = TableLength(sequence->computed, sequence->rung);  // pages with any in them
  for (const int layer : rungs_[rung].layers) {
    std::vector<int32_t>& table = sequence->page_tables[layer];
    for (int i = 0; i < after; ++i) {
      const int32_t first = table[2 * i], second = 2 * i + 1 < before ? table[2 * i + 1] : -1;
      const bool own_first = 2 * i >= shared, own_second = second >= 0 && 2 * i + 1 >= shared;
      const int32_t to = own_first ? first : own_second ? second : TakePage(layer);
      if (2 * i < computed) {
        packings->push_back({.layer = layer,
                             .first = first,
                             .second = 2 * i + 1 < computed ? second : -1,
                             .to = to});
      }
      if (own_first && own_second) pool_.Return(layer, std::span(&second, 1));
      table[i] = to;
    }
    table.resize(after);
  }
  for (std::vector<int32_t>& nodes = sequence->nodes; !nodes.empty(); nodes.pop_back()) {
    cache_.Release(nodes.back());
  }
  sequence->table_length = after;
}

std::vector<std::pair<int32_t, int32_t>> KvPages::SetLimit(int pages,
                                                           std::span<Sequence* const> running) {
  std::vector<std::pair<int32_t, int32_t>> moves;
  if (pages < pool_.total()) moves = pool_.Empty(pages);
  pool_.SetLimit(pages);
  if (moves.empty()) return moves;
  std::vector<int32_t> page_of(geometry_.pages);
  std::iota(page_of.begin(), page_of.end(), 0);
  for (const auto& [from, to] : moves) page_of[from] = to;
  for (Sequence* sequence : running) {
    for (std::vector<int32_t>& table : sequence->page_tables) {
      for (int32_t& page : table) page = page_of[page];
    }
  }
  cache_.Move(page_of);
  return moves;
}

std::span<const int32_t> KvPages::PageTokens(const Sequence& sequence, int rung, int page) const {
  const int tokens = page_tokens(rung);
  return std::span(sequence.tokens).subspan(static_cast<size_t>(page) * tokens, tokens);
}

bool KvPages::Holds(int rung, int layer) const {
  const std::vector<int>& layers = rungs_[rung].layers;
  return std::binary_search(layers.begin(), layers.end(), layer);
}

void KvPages::CheckInvariants(std::span<Sequence* const> running) const {
  pool_.CheckInvariants();
  std::vector<bool> seen(geometry_.pages, false);
  std::vector<int> held(geometry_.layers, 0);
  std::vector<int> users(cache_.capacity(), 0);
  for (const Sequence* sequence : running) {
    const RequestId id = sequence->request.id;
    const int64_t covered = int64_t{sequence->table_length} * page_tokens(sequence->rung);
    Invariant(sequence->computed <= std::min<int64_t>(sequence->size(), covered),
              "request {}: {} computed of {} tokens in {} pages", id, sequence->computed,
              sequence->size(), sequence->table_length);
    const int shared = static_cast<int>(sequence->nodes.size());
    Invariant(shared * page_tokens(sequence->rung) <= sequence->computed,
              "request {} shares {} pages, {} tokens are computed", id, shared, sequence->computed);
    for (int page = 0; page < shared; ++page) {
      const int32_t node = sequence->nodes[page];
      const int32_t parent = page == 0 ? PrefixCache::kNone : sequence->nodes[page - 1];
      Invariant(cache_.Find(sequence->node_rung, parent,
                            PageTokens(*sequence, sequence->rung, page)) == node,
                "request {}: page {} is not that of its tokens", id, page);
      ++users[node];
    }
    for (int layer = 0; layer < geometry_.layers; ++layer) {
      const std::vector<int32_t>& table = sequence->page_tables[layer];
      const int expected = Holds(sequence->rung, layer) ? sequence->table_length : 0;
      Invariant(static_cast<int>(table.size()) == expected,
                "request {} holds {} pages of layer {}, expected {}", id, table.size(), layer,
                expected);
      if (expected == 0) continue;
      held[layer] += expected - shared;
      for (int i = 0; i < expected; ++i) {
        const int32_t page = table[i];
        if (i < shared) {
          Invariant(page == cache_.pages(sequence->nodes[i])[layer],
                    "request {}: page {} of layer {} is not that of its node", id, page, layer);
          continue;
        }
        Invariant(pool_.layer_of(page) == layer && !pool_.cached(page) && !seen[page],
                  "request {}: page {} of layer {} is not its own", id, page, layer);
        seen[page] = true;
      }
    }
  }
  cache_.CheckInvariants(users, &seen, &held);
  for (int32_t page = 0; page < geometry_.pages; ++page) {
    Invariant(seen[page] == (pool_.layer_of(page) >= 0), "page {} is out, but nobody has it", page);
  }
  for (int layer = 0; layer < geometry_.layers; ++layer) {
    Invariant(held[layer] == pool_.used_by(layer), "layer {}: sequences hold {} pages, the pool {}",
              layer, held[layer], pool_.used_by(layer));
  }
}

}  // namespace espalier
