// Which rung a sequence is served at: the policy's, or the nearest at which its bounds, its pages
// and the weights in memory let it be.
//
// Nearest of those at which it fits is a harder one, if there is any, and of those whose weights
// are in memory a milder one, if there is any: more memory may never come, weights do.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/scheduling/kv_pages.h"
#include "engine/scheduling/sequence.h"
#include "policy/policy.h"

namespace espalier {

class RungChooser {
 public:
  // All of them must outlive the chooser. At first the weights of all rungs are in memory.
  RungChooser(const Ladder& ladder, const KvPages& pages, const Policy& policy);

  // Those that the bounds allow; the one alone that they name, or the hardest milder one allowed.
  RungSet Allowed(const PruneBounds& bounds) const;
  // ResourceExhausted if the request, of which these are allowed, fits as a whole at none that the
  // policy serves; it names the rung at which least is missing.
  absl::Status CheckFits(const Request& request, RungSet allowed) const;
  // The fewest pages that it takes at any of those.
  int64_t LeastPages(const Request& request) const;

  // The policy's choice, or the rung that was named.
  int PolicyRung(const Sequence& sequence) const;
  // Those that it is served at, were their weights in memory: at which it fits, as a whole while it
  // waits and with what it holds as it runs; or, if there is less memory than when it was accepted,
  // those of least KV. Who runs never goes where K and V are larger.
  RungSet Open(const Sequence& sequence) const;
  // Of those the policy's, or the nearest.
  int Wished(const Sequence& sequence) const;
  // What it is served at; -1 if weights of none that it may have are in memory.
  int Choose(const Sequence& sequence) const;
  // Why it is not at the policy's rung, or the next that it could have: it fits only elsewhere.
  bool HeldByMemory(const Sequence& sequence) const;
  // Or: weights of the one that it would be at are not in memory.
  bool HeldByWeights(const Sequence& sequence) const;

  // The pages there may be. At first all of the pool.
  int limit() const { return limit_; }
  void set_limit(int pages) { limit_ = pages; }
  // Rungs whose weights are in memory.
  RungSet in_memory() const { return in_memory_; }
  void set_in_memory(RungSet rungs) { in_memory_ = rungs; }
  // The pages there may be for who has no rung but this one, [rungs], where that is more than the
  // limit: by what weights of other rungs leave.
  void set_most_pages(std::span<const int> pages) {
    most_pages_.assign(pages.begin(), pages.end());
  }

 private:
  int MostPages(int rung) const;
  // Of those the ones at which so many tokens fit.
  RungSet Fitting(int64_t tokens, RungSet rungs) const;
  // Of those the ones that the policy serves, or all that are named.
  RungSet WithinPolicy(const Request& request, RungSet rungs) const;
  // Those that it could be at by what is allowed, by the policy, and by the K and V that it has.
  RungSet Reach(const Sequence& sequence) const;
  // Of those the ones of least KV.
  RungSet LeastKv(RungSet rungs) const;

  const Ladder& ladder_;
  const KvPages& pages_;
  const Policy& policy_;
  std::vector<int> mildest_;     // [rungs]: the first whose K and V are as large
  RungSet in_memory_;            // whose weights are in memory
  int limit_;                    // pages
  std::vector<int> most_pages_;  // [rungs], or empty: no more than the limit
};

}  // namespace espalier
