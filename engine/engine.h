// The engine: Submit, Cancel, Step(now). Single-threaded; starts no thread, reads no clock.
// Executors may: how far weights come back in a step is theirs to say, and the model's goes by
// time.
#pragma once

#include <chrono>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/executor.h"
#include "engine/scheduling/scheduler.h"
#include "engine/weight_keeper.h"
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

// Until the next step where one did no work although somebody waits: soon, without spinning.
inline constexpr Instant kStepRetry = std::chrono::milliseconds(1);

// Weights in memory, as of now; counts are since start.
struct WeightsReport {
  RungSet rungs = 0;        // that can be served
  uint64_t releases = 0;    // times that weights left
  uint64_t returns = 0;     // times that some came back
  double return_s = 0;      // what the last return took of steps' time
  double return_s_sum = 0;  // and all of them
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

  // At most `pages` KV pages from now on, or as few as those who run allow: as
  // Scheduler::LimitPages, and then again after each step until it is so. And so many more as
  // weights that have left memory are worth: they leave where that is needed, first of all, and
  // where `pages` is below 0.
  void LimitPages(int pages, Instant now);

  // As Scheduler's.
  void SawMemory(const MemoryView& memory) { scheduler_.SawMemory(memory); }
  void CountArrivals(int requests) { scheduler_.CountArrivals(requests); }
  void SetLosses(std::span<const double> losses) { scheduler_.SetLosses(losses); }

  // Lets weights leave, or come back for some milliseconds, as it is due. Part of Step; who has no
  // step to do is told when to ask again: `now` if at once, kNever if something has to happen
  // first.
  Instant TendWeights(Instant now);
  const WeightsReport& weights() const { return weights_; }
  // Why weights cannot come back; OK while they can. Else a step is an error, and the engine must
  // not be stepped again.
  const absl::Status& lost() const { return lost_; }
  bool all_weights() const { return weights_.rungs == keeper_.all(); }

  // KV pages that all weights which may leave are worth, and of those there are how many there
  // would be beside all weights: less than none where it takes weights that have left.
  int weight_pages() const { return executor_->ReleasablePages(0); }
  int pages_beside_weights() const;

  bool idle() const { return scheduler_.idle(); }
  const Scheduler& scheduler() const { return scheduler_; }

 private:
  // Pages there may be while weights of `rungs` are in memory.
  int Pages(RungSet rungs) const;
  void SetPages(int pages, Instant now);
  // Whose weights are in memory, or on their way there.
  RungSet rungs_due() const { return coming_ != 0 ? coming_ : keeper_.present(); }
  // There are more pages than there may be.
  bool overruns() const { return scheduler_.pages_total() > Pages(rungs_due()); }
  // Lets weights go where pages in use do not fit, and makes the pool what there may be.
  void FitMemory(Instant now);
  // Weights of these and no others, at once. False if somebody runs who could not.
  bool Exchange(RungSet rungs, Instant now);
  void Changed(RungSet rungs, Instant now, double seconds);

  Scheduler scheduler_;
  Executor* executor_;
  const int pages_whole_;
  int pages_wanted_;
  WeightKeeper keeper_;
  RungSet coming_ = 0;   // coming back, and those that are there; 0: none
  double coming_s_ = 0;  // taken so far
  WeightsReport weights_;
  absl::Status lost_;  // weights that cannot come back
  // As Scheduler::set_most_pages, and what it was made for.
  std::vector<int> most_pages_;
  std::pair<int, int> most_pages_of_ = {0, 0};
  StepResult result_;
  StepReport report_;
};

}  // namespace espalier
