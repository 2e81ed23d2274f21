// Which rung a sequence is served at: the policy's, or the nearest at which its bounds, its pages
// and the weights in memory let it be.
//
// Nearest among those open is a harder one, if there is any; nearest among those whose weights are
// in memory is a milder one, if there is any: these come back, and memory may not.
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
  // Of those, all at which the whole request fits, beside whose weights alone it needs to.
  RungSet Fitting(const Request& request, RungSet allowed) const;
  // ResourceExhausted if there are none; it names the rung at which least is missing.
  absl::Status CheckFits(const Request& request, RungSet allowed) const;

  // The policy's choice, or the rung that was named.
  int PolicyRung(const Sequence& sequence) const;
  // What it would be served at if all weights were in memory. Who runs never goes where K and V are
  // larger.
  int Wished(const Sequence& sequence) const { return Nearest(sequence, Open(sequence)); }
  // What it is served at; -1 if weights of none that it may have are in memory.
  int Choose(const Sequence& sequence) const;
  // Those that Wished is one of: at which it fits, or all if there are none.
  RungSet Open(const Sequence& sequence) const;
  // Whether it runs where it does because weights of another rung are not in memory.
  bool HeldByWeights(const Sequence& sequence) const;

  // The fewest pages that a live sequence may have to have alone: at its rung if it runs, whose K
  // and V never get larger, else at the one allowed that takes least.
  int64_t LeastPages(const Sequence& sequence) const;

  // Rungs whose weights are in memory.
  RungSet served() const { return served_; }
  void Serve(RungSet rungs) { served_ = rungs; }
  // The most pages there could be for who may have no rung but this one, [rungs].
  void set_most_pages(std::span<const int> pages) {
    most_pages_.assign(pages.begin(), pages.end());
  }

 private:
  int64_t MostPages(int rung) const;
  // The policy's rung, or the nearest of the set.
  int Nearest(const Sequence& sequence, RungSet rungs) const;

  const Ladder& ladder_;
  const KvPages& pages_;
  const Policy& policy_;
  std::vector<int> mildest_;     // [rungs]: the first whose K and V are as large
  RungSet served_;               // whose weights are in memory
  std::vector<int> most_pages_;  // [rungs], or empty: as many as there are
};

}  // namespace espalier
