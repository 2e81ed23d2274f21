#include "engine/scheduling/prefix_cache.h"

#include <algorithm>
#include <bit>

#include "engine/scheduling/invariant.h"

namespace espalier {

PrefixCache::PrefixCache(int nodes, int layers, int page_tokens, PagePool* pool)
    : layers_(layers), page_tokens_(page_tokens), pool_(pool) {
  nodes_.resize(static_cast<size_t>(nodes) + 1);
  tokens_.resize(static_cast<size_t>(nodes) * page_tokens);
  pages_.resize(static_cast<size_t>(nodes) * layers);
  buckets_.assign(std::bit_ceil(nodes_.size()), kNone);
  for (int32_t node = nodes - 1; node >= 0; --node) {
    nodes_[node].in_bucket = vacant_;
    vacant_ = node;
  }
  nodes_[idle()].older = nodes_[idle()].newer = idle();
}

size_t PrefixCache::Bucket(uint64_t key, int32_t parent, std::span<const int32_t> tokens) const {
  // Mixes as murmur3's finaliser does, a token at a time.
  uint64_t hash = key;
  const auto add = [&hash](int32_t value) {
    hash = (hash ^ static_cast<uint32_t>(value)) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  };
  add(parent);
  for (const int32_t token : tokens) add(token);
  return hash & (buckets_.size() - 1);
}

int32_t PrefixCache::Find(uint64_t key, int32_t parent, std::span<const int32_t> tokens) const {
  int32_t node = buckets_[Bucket(key, parent, tokens)];
  while (node != kNone && !(nodes_[node].parent == parent && nodes_[node].key == key &&
                            std::ranges::equal(this->tokens(node), tokens))) {
    node = nodes_[node].in_bucket;
  }
  return node;
}

int32_t PrefixCache::Insert(uint64_t key, int32_t parent, std::span<const int32_t> tokens,
                            std::span<const std::vector<int32_t>> page_tables, int index) {
  const int32_t node = vacant_;
  Invariant(node != kNone, "a prefix cache of {} nodes is full", capacity());
  vacant_ = nodes_[node].in_bucket;
  int32_t& bucket = buckets_[Bucket(key, parent, tokens)];
  nodes_[node] = {.key = key,
                  .parent = parent,
                  .tokens = static_cast<int32_t>(tokens.size()),
                  .users = 1,
                  .in_bucket = bucket};
  bucket = node;
  std::ranges::copy(tokens, Row(tokens_, node, page_tokens_).begin());
  const std::span<int32_t> pages = Row(pages_, node, layers_);
  for (int layer = 0; layer < layers_; ++layer) {
    pages[layer] = page_tables[layer].empty() ? -1 : page_tables[layer][index];
  }
  return node;
}

void PrefixCache::Use(int32_t node) {
  if (++nodes_[node].users > 1) return;
  Unlink(node);
  for (const int32_t page : pages(node)) {
    if (page >= 0) pool_->Reuse(page);
  }
}

void PrefixCache::Release(int32_t node) {
  Invariant(nodes_[node].users > 0, "node {} of the prefix cache has no user to release it", node);
  if (--nodes_[node].users > 0) return;
  for (const int32_t page : pages(node)) {
    if (page >= 0) pool_->Cache(page);
  }
  nodes_[node].older = nodes_[idle()].older;
  nodes_[node].newer = idle();
  nodes_[nodes_[node].older].newer = node;
  nodes_[idle()].older = node;
}

bool PrefixCache::Evict() {
  const int32_t node = nodes_[idle()].newer;
  if (node == idle()) return false;
  Unlink(node);
  Node& evicted = nodes_[node];
  int32_t* link = &buckets_[Bucket(evicted.key, evicted.parent, tokens(node))];
  while (*link != node) link = &nodes_[*link].in_bucket;
  *link = evicted.in_bucket;
  for (int layer = 0; layer < layers_; ++layer) {
    const std::span<const int32_t> page = pages(node).subspan(layer, 1);
    if (page[0] < 0) continue;
    pool_->Return(layer, page);
    ++evicted_pages_;
  }
  evicted = {.in_bucket = vacant_};
  vacant_ = node;
  return true;
}

void PrefixCache::Move(std::span<const int32_t> page_of) {
  for (int32_t node = 0; node < capacity(); ++node) {
    if (nodes_[node].users < 0) continue;
    for (int32_t& page : Row(pages_, node, layers_)) {
      if (page >= 0) page = page_of[page];
    }
  }
}

void PrefixCache::Unlink(int32_t node) {
  nodes_[nodes_[node].older].newer = nodes_[node].newer;
  nodes_[nodes_[node].newer].older = nodes_[node].older;
}

void PrefixCache::CheckInvariants(std::span<const int> users, std::vector<bool>* seen,
                                  std::vector<int>* used) const {
  std::vector<int> turn(nodes_.size(), -1);  // in which a node without users is evicted
  int turns = 0;
  for (int32_t node = nodes_[idle()].newer; node != idle(); node = nodes_[node].newer) {
    Invariant(turn[node] < 0 && nodes_[node].users == 0, "node {} waits for eviction with {} users",
              node, nodes_[node].users);
    turn[node] = turns++;
  }
  for (int32_t node = 0; node < capacity(); ++node) {
    const Node& checked = nodes_[node];
    if (checked.users < 0) {
      Invariant(users[node] == 0, "node {} is used, but not in the tree", node);
      continue;
    }
    Invariant(checked.users == users[node], "node {} has {} users, counted {}", node, checked.users,
              users[node]);
    Invariant((checked.users == 0) == (turn[node] >= 0), "node {} has {} users and turn {}", node,
              checked.users, turn[node]);
    Invariant(Find(checked.key, checked.parent, tokens(node)) == node,
              "node {} is not found, or twice there", node);
    if (checked.parent != kNone) {
      const Node& parent = nodes_[checked.parent];
      Invariant(parent.users >= checked.users && parent.key == checked.key,
                "node {} has {} users, its parent {}", node, checked.users, parent.users);
      Invariant(parent.users > 0 || turn[node] < turn[checked.parent],
                "node {} outlives its parent", node);
    }
    for (int layer = 0; layer < layers_; ++layer) {
      const int32_t page = pages(node)[layer];
      if (page < 0) continue;
      Invariant(pool_->layer_of(page) == layer && pool_->cached(page) == (checked.users == 0) &&
                    !(*seen)[page],
                "page {} of layer {} is not node {}'s own, or in another state", page, layer, node);
      (*seen)[page] = true;
      if (checked.users > 0) ++(*used)[layer];
    }
  }
}

}  // namespace espalier
