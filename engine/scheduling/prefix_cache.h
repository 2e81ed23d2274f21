// Full pages by the tokens that led to them, so that sequences that begin alike share their start.
//
// A tree. A node is one page of tokens: one page in each layer that keeps K and V, written in full
// and never again. Its parent is the page of tokens before it. The K and V of a token are shaped by
// all tokens up to it and by the key (what the caller computes with: the rung), so a node is known
// by (key, parent, tokens). All three are compared; the hash only says where to look.
//
// Who uses a node uses its ancestors too, and lets go of them last. So what has no user stands
// behind its children in the order of release, and the first in that order, the least recently
// used, is always a leaf.
//
// Nothing is allocated after construction.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/scheduling/page_pool.h"

namespace espalier {

class PrefixCache {
 public:
  static constexpr int32_t kNone = -1;

  // Room for `nodes` nodes of at most `page_tokens` tokens, as many in all of a key, in at most
  // `layers` layers. `pool` must outlive the cache.
  PrefixCache(int nodes, int layers, int page_tokens, PagePool* pool);

  // The node of `tokens`, a page of them, after `parent` (kNone: at the start), or kNone.
  int32_t Find(uint64_t key, int32_t parent, std::span<const int32_t> tokens) const;

  // Adds a node that Find does not find, with one user. Its pages are the ones at `index` of
  // `page_tables` [layers], where a table may be empty; they must be in use and of no other node.
  int32_t Insert(uint64_t key, int32_t parent, std::span<const int32_t> tokens,
                 std::span<const std::vector<int32_t>> page_tables, int index);

  // One user more or less. Pages without a user are cached in the pool. Nodes of one user are
  // released last to first.
  void Use(int32_t node);
  void Release(int32_t node);

  // Frees the pages of the least recently used node; false if all have users.
  bool Evict();

  // Pages of nodes have moved: page_of[p] is where page p is now.
  void Move(std::span<const int32_t> page_of);

  int users(int32_t node) const { return nodes_[node].users; }
  // [layers]; -1 where the layer keeps no K and V.
  std::span<const int32_t> pages(int32_t node) const { return Row(pages_, node, layers_); }
  uint64_t evicted_pages() const { return evicted_pages_; }  // since start

  // Crashes unless every node has the users [nodes] that were counted, children have no user where
  // their parent has none and go before it, and every page is of one node and not in `seen`
  // [pool pages]. Adds pages to `seen`, and those with users to `used` [layers].
  void CheckInvariants(std::span<const int> users, std::vector<bool>* seen,
                       std::vector<int>* used) const;
  int capacity() const { return static_cast<int>(nodes_.size()) - 1; }

 private:
  struct Node {
    uint64_t key = 0;
    int32_t parent = kNone;
    int32_t tokens = 0;         // how many
    int32_t users = -1;         // -1: not in the tree
    int32_t in_bucket = kNone;  // the next one of the bucket, or of the vacant nodes
    int32_t older = kNone;      // of the nodes without a user; in a ring with idle()
    int32_t newer = kNone;
  };

  template <typename T>
  static std::span<T> Row(std::vector<T>& all, int32_t node, int width) {
    return std::span<T>(all).subspan(static_cast<size_t>(node) * width, width);
  }
  template <typename T>
  static std::span<const T> Row(const std::vector<T>& all, int32_t node, int width) {
    return std::span<const T>(all).subspan(static_cast<size_t>(node) * width, width);
  }

  int32_t idle() const { return capacity(); }  // the ring's head: no node, `newer` is the oldest
  std::span<const int32_t> tokens(int32_t node) const {
    return Row(tokens_, node, page_tokens_).first(nodes_[node].tokens);
  }
  size_t Bucket(uint64_t key, int32_t parent, std::span<const int32_t> tokens) const;
  void Unlink(int32_t node);  // from the ring

  const int layers_;
  const int page_tokens_;
  PagePool* const pool_;
  std::vector<Node> nodes_;       // [capacity + 1]
  std::vector<int32_t> tokens_;   // [capacity, page_tokens]
  std::vector<int32_t> pages_;    // [capacity, layers]
  std::vector<int32_t> buckets_;  // a power of two, the first node of each
  int32_t vacant_ = kNone;
  uint64_t evicted_pages_ = 0;
};

}  // namespace espalier
