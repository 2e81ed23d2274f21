// The engine: Submit, Cancel, Step(now). Single-threaded; starts no thread, reads no clock.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/executor.h"
#include "engine/scheduling/scheduler.h"
#include "policy/policy.h"

namespace espalier {

// What one step did: everything that goes up to the server.
struct StepReport {
  std::vector<SequenceOutput> outputs;  // expired ones first, then in the order of the batch
  SchedulerStats stats;
  PhaseTimes phases;
  ProbeUse probe;
  int decode_rows = 0;
  int prefill_rows = 0;
  int sequences = 0;  // spans of the batch

  bool did_work() const { return decode_rows + prefill_rows > 0 || !outputs.empty(); }
};

class Engine {
 public:
  // `executor` and `policy` must outlive the engine.
  Engine(const SchedulerOptions& options, const KvGeometry& geometry, const Ladder& ladder,
         Executor* executor, Policy* policy);

  absl::Status Submit(Request request);  // as Scheduler::Submit
  bool Cancel(RequestId id);             // as Scheduler::Cancel

  // Schedules, executes and commits one batch. The report is reused by the next call. An error
  // means that the device is lost: the engine must not be stepped again, but may be cancelled on.
  absl::StatusOr<const StepReport*> Step(Instant now);

  // At most `pages` KV pages from now on, or as few as those who were accepted allow: as
  // Scheduler::LimitPages, and then again after each step until it is so.
  void LimitPages(int pages, Instant now);

  bool idle() const { return scheduler_.idle(); }
  const Scheduler& scheduler() const { return scheduler_; }

 private:
  Scheduler scheduler_;
  Executor* executor_;
  int pages_wanted_;
  StepResult result_;
  StepReport report_;
};

}  // namespace espalier
