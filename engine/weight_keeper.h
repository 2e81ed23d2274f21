// Which rungs' weights should be in memory: a pure decision from what is served, wanted and short.
//
// All of them while there is room. Where there is not, weights that nobody needs are worth KV pages
// and leave: first of all that memory pressure takes, since nobody is served worse for it. They
// come back when they are wanted and there is room, in turn for others if need be, or when there
// has been room for all for a while.
#pragma once

#include <functional>

#include "engine/scheduling/request.h"
#include "engine/scheduling/scheduler.h"
#include "policy/policy.h"

namespace espalier {

class WeightKeeper {
 public:
  struct Options {
    // For which there must have been room for all weights before they come back unasked, and
    // between an exchange and the next; but not less than so many times what the last return took,
    // which so costs a twentieth of the time at most.
    double dwell_s = 1;
    double returns_per_dwell = 20;
    double room = 0.05;  // of the pages in need, to be there beyond them before weights come back
  };

  // KV pages that weights are worth which no rung of a set needs: fewer for more rungs.
  using Releasable = std::function<int(RungSet served)>;

  WeightKeeper(const Options& options, int rungs, Releasable releasable);

  // What is to be in memory; `present` if all is as it should be. Where it is more than now there
  // is room for it; where it is something else all who run can be at rungs of it. `pages` there may
  // be with all weights in memory, so many fewer than none as weights are too many, of
  // `pages_whole`.
  RungSet Decide(Instant now, const RungUse& use, int64_t pages, int pages_whole);

  // What those who run can do with, and nothing else: where even their pages do not fit.
  RungSet Least(const RungUse& use) const;

  // The set with all rungs that need nothing else.
  RungSet Closure(RungSet served) const;

  // It was done, and took so long in all.
  void Done(RungSet present, Instant now, double seconds);
  RungSet present() const { return present_; }
  RungSet all() const { return all_; }

  // When Decide would bring all back, if nothing happens until then; kNever: not by waiting.
  Instant next() const;

 private:
  Instant dwell() const;

  const Options options_;
  const RungSet all_;
  const Releasable releasable_;
  RungSet present_;
  Instant changed_ = kNever;      // last; kNever: not yet
  Instant roomy_since_ = kNever;  // kNever: there is no room for all
  double return_s_ = 0;           // that the last return took
};

}  // namespace espalier
