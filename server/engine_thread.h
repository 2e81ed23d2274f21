// The one thread that touches the engine: commands in, steps, tokens out.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"
#include "server/engine_pair.h"
#include "server/inbox.h"
#include "server/load_snapshot.h"
#include "server/quality_check.h"
#include "server/rate_meter.h"
#include "server/ready_queue.h"
#include "server/step_times.h"
#include "server/token_stream.h"

namespace espalier {

// What the engine thread tells, on its own thread; each must be quick. Empty ones are skipped.
struct EngineHooks {
  std::function<Ledger(const SchedulerStats&)> ledger;
  // After each step, and whenever the engine finds nothing to do (with an empty report).
  std::function<void(const StepReport&, const LoadSnapshot&, const StepTimes&)> on_step;
  // Once, when the device is lost: nothing will be served any more.
  std::function<void(const absl::Status&)> on_lost;
  // Driven beside the engine, if there is one; must outlive the thread.
  QualityCheck* quality = nullptr;
  // After each of its checks.
  std::function<void()> on_check;
};

// The engine that takes another's place, with what EngineHooks has of the first.
struct NextEngine {
  Engine* engine = nullptr;
  std::function<Ledger(const SchedulerStats&)> ledger;
  QualityCheck* quality = nullptr;
  std::function<void()> on_check;
};

class EngineThread {
 public:
  // Starts the thread. `engine` and `ready` must outlive it; nobody else touches `engine` from now
  // on. At most `max_waiting` requests wait.
  EngineThread(Engine* engine, ReadyQueue* ready, int max_waiting, EngineHooks hooks);
  // Drains with no time to spare.
  ~EngineThread();

  Inbox& inbox() { return inbox_; }

  // As Engine::LimitPages, before the next step. Any thread; of several the last counts.
  void LimitPages(int pages) {
    pages_wanted_.store(pages, std::memory_order_release);
    inbox_.Wake();
  }

  // Who takes a place from now on is served by `next`, which has nothing to do; who took one before
  // finishes where it is. `left` is called on the engine thread once the engine before has nobody
  // left, and is not touched any more. Returns when this holds, with the requests that finish so;
  // none if the thread ends first: then `left` is not called. Not while another is to be left. Any
  // thread.
  std::optional<int> Replace(NextEngine next, std::function<void()> left);

  // Runs `work` on the engine thread, between two steps, and returns; false, and it is not run, if
  // that has ended. Any thread.
  bool BetweenSteps(const std::function<void()>& work);
  // The same, without waiting for it: not a step that takes long holds up who asks.
  void SoonBetweenSteps(std::function<void()> work);

  // As Engine::SawMemory. Any thread.
  void SawMemory(const MemoryView& memory) {
    std::lock_guard lock(memory_mutex_);
    memory_ = memory;
  }

  // The state after the last step, with what arrived since. Any thread; no wait for a step.
  LoadSnapshot load() const;

  // How long work has waited without a step that did any, seconds; 0 while nothing waits. Any
  // thread.
  double seconds_without_progress() const;

  // Why the device is lost; OK while it is not. Any thread.
  absl::Status lost() const;

  // Takes no new requests, lets the accepted ones finish for at most `timeout`, ends the rest with
  // StreamEnd::kShutdown and joins. False if some had to be ended so. Again: tells the same.
  bool Drain(Instant timeout);

 private:
  // Of pages_wanted_, which may be below 0.
  static constexpr int kAsTheyAre = std::numeric_limits<int>::min();

  void Run();
  // Begins a check of quality if one is due, and ends the one that runs for others.
  void BeginCheck(Instant now, Instant idle_since);
  void EndCheck(Instant now);
  void Obey(Command& command);
  void Submit(Submission submission);
  void DoWork();
  // Submits newcomers who waited for pages of the engine before, and lets that go when it is done.
  void Settle(Instant now);
  SchedulerStats Stats() const;
  void Deliver(const SequenceOutput& output, Instant now);
  void EndAll(const StreamEnd& end);
  void Lose(const absl::Status& status);
  void Publish(Instant now);

  ReadyQueue* const ready_;
  const EngineHooks hooks_;
  Inbox inbox_;

  // Engine thread only.
  EnginePair engines_;
  NextEngine serving_;                                         // what hooks_ tell of the current
  std::function<Ledger(const SchedulerStats&)> lefts_ledger_;  // of the one before
  std::function<void()> on_left_;
  int generation_ = 0;            // of the current
  std::vector<Submission> held_;  // for pages of the one before
  struct Reader {
    std::shared_ptr<TokenStream> stream;
    Engine* engine = nullptr;  // null: held
    Instant last_token = kNever;
  };
  std::unordered_map<RequestId, Reader> readers_;
  std::vector<std::shared_ptr<TokenStream>> posts_;  // of this step
  std::vector<double> token_gaps_;                   // of this step
  LoadSnapshot next_load_;
  int tokens_to_tell_ = 0;  // since the last Publish
  int finishes_to_tell_ = 0;

  mutable std::mutex load_mutex_;  // held for a copy
  LoadSnapshot load_;
  absl::Status lost_;
  RateMeter tokens_{5.0};
  RateMeter finishes_{5.0};

  // Of the last step that did work, or since when there is any: steady nanoseconds; 0: idle.
  std::atomic<int64_t> last_progress_{0};
  std::atomic<bool> abandon_{false};  // the drain's time is out
  std::atomic<int> pages_wanted_{kAsTheyAre};
  std::mutex memory_mutex_;  // held for a copy
  MemoryView memory_;
  bool abandoned_ = false;  // engine thread; read after join

  // Who waits for the engine thread to do something, waits on `done_work_`.
  std::mutex work_mutex_;
  std::condition_variable done_work_;
  std::vector<std::function<void()>> work_;
  bool works_ = true;  // false: the thread has ended, or is about to
  std::atomic<bool> has_work_{false};

  std::mutex exit_mutex_;
  std::condition_variable exit_;
  bool exited_ = false;

  std::thread thread_;  // last: everything is there when it starts
};

}  // namespace espalier
