#include "engine/engine.h"

#include <algorithm>
#include <utility>

#include "engine/scheduling/invariant.h"

namespace espalier {

Engine::Engine(const SchedulerOptions& options, const KvGeometry& geometry, const Ladder& ladder,
               Executor* executor, Policy* policy)
    : scheduler_(options, geometry, ladder, policy),
      executor_(executor),
      pages_whole_(geometry.pages),
      pages_wanted_(geometry.pages),
      keeper_({}, ladder.size(),
              [executor](RungSet rungs) { return executor->ReleasablePages(rungs); }) {
  weights_.rungs = keeper_.all();
  most_pages_.reserve(ladder.size());
}

absl::Status Engine::Submit(Request request) { return scheduler_.Submit(std::move(request)); }

bool Engine::Cancel(RequestId id) { return scheduler_.Cancel(id); }

void Engine::LimitPages(int pages, Instant now) {
  pages_wanted_ = pages;
  FitMemory(now);
}

int Engine::Pages(RungSet rungs) const {
  const int64_t pages = int64_t{pages_wanted_} + executor_->ReleasablePages(rungs);
  return static_cast<int>(std::clamp<int64_t>(pages, 0, pages_whole_));
}

int Engine::pages_beside_weights() const {
  return scheduler_.pages_total() - executor_->ReleasablePages(rungs_due());
}

void Engine::SetPages(int pages, Instant now) {
  const int before = scheduler_.pages_total();
  const auto moves = scheduler_.LimitPages(pages, now);
  if (!scheduler_.packings().empty()) executor_->PackPages(scheduler_.packings());
  if (scheduler_.pages_total() != before) executor_->FitPages(moves, scheduler_.pages_total());
}

void Engine::FitMemory(Instant now) {
  const std::pair of(pages_wanted_, executor_->ReleasablePages(0));
  if (std::exchange(most_pages_of_, of) != of) {
    most_pages_.clear();
    for (RungSet rung = 1; rung != 0 && (rung & keeper_.all()) != 0; rung <<= 1) {
      most_pages_.push_back(Pages(rung));
    }
    scheduler_.set_most_pages(most_pages_);
  }
  const RungUse use = scheduler_.rung_use();
  if (use.pages_used > Pages(rungs_due())) {
    const RungSet least = keeper_.Least(use);
    const bool helps = coming_ != 0 || executor_->ReleasablePages(least) >
                                           executor_->ReleasablePages(keeper_.present());
    coming_ = 0;
    if (helps) Invariant(Exchange(least, now), "rungs {:b} are not all that are run at", least);
  }
  SetPages(Pages(rungs_due()), now);
}

bool Engine::Exchange(RungSet rungs, Instant now) {
  if (!scheduler_.ServeRungs(rungs)) return false;
  if (!scheduler_.packings().empty()) executor_->PackPages(scheduler_.packings());
  if (Pages(rungs) < scheduler_.pages_total()) SetPages(Pages(rungs), now);
  const absl::StatusOr<WeightsFit> fit = executor_->FitWeights(rungs, /*at_once=*/true);
  if (!fit.ok()) {
    lost_ = fit.status();
  } else {
    Changed(rungs, now, fit->seconds);
  }
  return true;
}

void Engine::Changed(RungSet rungs, Instant now, double seconds) {
  if ((keeper_.present() & ~rungs) != 0) ++weights_.releases;
  if ((rungs & ~keeper_.present()) != 0) {
    ++weights_.returns;
    weights_.return_s = seconds;
    weights_.return_s_sum += seconds;
  }
  weights_.rungs = rungs;
  keeper_.Done(rungs, now, seconds);
}

Instant Engine::TendWeights(Instant now) {
  if (scheduler_.idle() && overruns()) FitMemory(now);  // who needed the pages was cancelled
  const bool settled = all_weights() && coming_ == 0 &&
                       (pages_wanted_ >= pages_whole_ || executor_->ReleasablePages(0) == 0);
  if (!lost_.ok() || settled) return kNever;
  const RungUse use = scheduler_.rung_use();
  // Whom nothing else could be done for until then waits for all of it.
  const bool waited_for = !scheduler_.idle() && use.running == 0;
  if (waited_for && (use.head & coming_) == 0) coming_ = 0;  // of no use to whoever waits
  if (coming_ == 0) {
    const RungSet before = keeper_.present();
    const RungSet rungs = keeper_.Decide(now, use, pages_wanted_, pages_whole_);
    if (rungs == before) return keeper_.next();
    if ((before & ~rungs) != 0) {
      if (!Exchange(rungs, now)) return keeper_.next();
      FitMemory(now);
      return now;
    }
    coming_ = rungs;
    coming_s_ = 0;
    FitMemory(now);  // room for them first
  }
  if (coming_ == 0) return now;
  const absl::StatusOr<WeightsFit> fit = executor_->FitWeights(coming_, waited_for);
  if (!fit.ok()) {
    lost_ = fit.status();
    return kNever;
  }
  coming_s_ += fit->seconds;
  if (fit->done) {
    // Nobody has to move for more of them.
    Invariant(scheduler_.ServeRungs(coming_), "rungs {:b} are back and not served", coming_);
    Changed(std::exchange(coming_, 0), now, coming_s_);
  }
  return now;
}

absl::StatusOr<const StepReport*> Engine::Step(Instant now) {
  scheduler_.Recycle(&report_.outputs);
  TendWeights(now);
  if (!lost_.ok()) return lost_;
  const Batch& batch = scheduler_.Schedule(now, &report_.outputs);
  if (!scheduler_.packings().empty()) executor_->PackPages(scheduler_.packings());
  report_.decode_rows = batch.decode_rows;
  report_.prefill_rows = batch.prefill_rows;
  report_.sequences = static_cast<int>(batch.spans.size());
  report_.phases = {};
  report_.probe = {};
  if (!batch.empty()) {
    result_.tokens.clear();
    result_.phases = {};
    result_.probe = {};
    if (absl::Status status = executor_->Execute(batch, &result_); !status.ok()) {
      scheduler_.Discard();
      return status;
    }
    scheduler_.Commit(result_, &report_.outputs);
    report_.phases = result_.phases;
    report_.probe = result_.probe;
  }
  if (overruns()) FitMemory(now);
#ifndef NDEBUG
  scheduler_.CheckInvariants();
#endif
  report_.stats = scheduler_.stats();
  return &report_;
}

}  // namespace espalier
