#include "engine/engine.h"

#include <utility>

namespace espalier {

Engine::Engine(const SchedulerOptions& options, const KvGeometry& geometry, const Ladder& ladder,
               Executor* executor, Policy* policy)
    : scheduler_(options, geometry, ladder, policy),
      executor_(executor),
      pages_wanted_(geometry.pages) {}

absl::Status Engine::Submit(Request request) { return scheduler_.Submit(std::move(request)); }

bool Engine::Cancel(RequestId id) { return scheduler_.Cancel(id); }

void Engine::LimitPages(int pages, Instant now) {
  pages_wanted_ = pages;
  const int before = scheduler_.pages_total();
  const auto moves = scheduler_.LimitPages(pages, now);
  if (!scheduler_.packings().empty()) executor_->PackPages(scheduler_.packings());
  if (scheduler_.pages_total() != before) executor_->FitPages(moves, scheduler_.pages_total());
}

absl::StatusOr<const StepReport*> Engine::Step(Instant now) {
  scheduler_.Recycle(&report_.outputs);
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
  if (scheduler_.pages_total() > pages_wanted_) LimitPages(pages_wanted_, now);
#ifndef NDEBUG
  scheduler_.CheckInvariants();
#endif
  report_.stats = scheduler_.stats();
  return &report_;
}

}  // namespace espalier
