#include "server/engine_thread.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "server/steady_clock.h"

namespace espalier {
namespace {

// What a call holds of gRPC's memory, about: 3.2 MiB more with 256 that wait (overload_test).
constexpr uint64_t kCallBytes = 12 << 10;

}  // namespace

EngineThread::EngineThread(Engine* engine, ReadyQueue* ready, int max_waiting, EngineHooks hooks)
    : ready_(ready),
      hooks_(std::move(hooks)),
      inbox_(max_waiting),
      engines_(engine),
      serving_{engine, hooks_.ledger, hooks_.quality, hooks_.on_check} {
  next_load_.max_waiting = max_waiting;
  Publish(SteadyNow());
  thread_ = std::thread([this] { Run(); });
  pthread_setname_np(thread_.native_handle(), "engine");
}

EngineThread::~EngineThread() { Drain(Instant::zero()); }

LoadSnapshot EngineThread::load() const {
  const int waiting = inbox_.waiting();  // what admission goes by
  const bool closed = inbox_.closed();
  std::lock_guard lock(load_mutex_);
  LoadSnapshot load = load_;
  const Instant now = SteadyNow();
  load.generated_tokens_per_second = tokens_.PerSecond(now);
  load.finished_per_second = finishes_.PerSecond(now);
  load.arriving = std::max(0, waiting - load.stats.waiting);
  load.draining = closed;
  return load;
}

double EngineThread::seconds_without_progress() const {
  const int64_t last = last_progress_.load(std::memory_order_relaxed);
  return last == 0 ? 0 : Seconds(SteadyNow() - Instant(last));
}

absl::Status EngineThread::lost() const {
  std::lock_guard lock(load_mutex_);
  return lost_;
}

bool EngineThread::BetweenSteps(const std::function<void()>& work) {
  bool done = false;
  SoonBetweenSteps([&] {
    work();
    done = true;
  });
  std::unique_lock lock(work_mutex_);
  done_work_.wait(lock, [&] { return done || !works_; });
  return done;
}

void EngineThread::SoonBetweenSteps(std::function<void()> work) {
  std::lock_guard lock(work_mutex_);
  if (!works_) return;
  work_.push_back(std::move(work));
  has_work_.store(true, std::memory_order_release);
  inbox_.Wake();
}

std::optional<int> EngineThread::Replace(NextEngine next, std::function<void()> left) {
  int before = 0;
  const bool replaced = BetweenSteps([&] {
    const Instant now = SteadyNow();
    EndCheck(now);
    const SchedulerStats stats = Stats();
    before = stats.running + stats.waiting + inbox_.Arriving(generation_);
    lefts_ledger_ = std::move(serving_.ledger);
    serving_ = std::move(next);
    on_left_ = std::move(left);
    engines_.Replace(serving_.engine, now);
    inbox_.NextGeneration();
    ++generation_;
  });
  return replaced ? std::optional(before) : std::nullopt;
}

void EngineThread::DoWork() {
  if (!has_work_.exchange(false, std::memory_order_acquire)) return;
  std::lock_guard lock(work_mutex_);
  for (const std::function<void()>& work : work_) work();
  work_.clear();
  done_work_.notify_all();
}

void EngineThread::Settle(Instant now) {
  if (engines_.left() == nullptr) return;
  // Commands that were taken have been obeyed: who is not in the engine now never will be.
  const bool done = engines_.left()->idle() && inbox_.Arriving(generation_ - 1) == 0;
  if (done) {
    engines_.Retire(now);
    lefts_ledger_ = {};
  }
  std::vector<Submission> held = std::exchange(held_, {});
  int64_t awaited = 0;
  for (Submission& submission : held) {
    const RequestId id = submission.request.id;
    if (submission.request.deadline <= now) {
      submission.stream->End(
          {.cause = StreamEnd::Cause::kFinished, .reason = FinishReason::kDeadline});
      posts_.push_back(std::move(submission.stream));
      readers_.erase(id);
      ++finishes_to_tell_;
    } else if (engines_.MustWait(submission.request)) {
      awaited += engines_.PagesOf(submission.request);
      held_.push_back(std::move(submission));
    } else {
      readers_.erase(id);
      Submit(std::move(submission));
    }
  }
  engines_.set_awaited_pages(awaited);
  if (done) std::exchange(on_left_, {})();
}

SchedulerStats EngineThread::Stats() const {
  SchedulerStats stats = engines_.stats();
  stats.waiting += static_cast<int>(held_.size());
  return stats;
}

bool EngineThread::Drain(Instant timeout) {
  if (!thread_.joinable()) return !abandoned_;
  inbox_.Close();
  {
    std::unique_lock lock(exit_mutex_);
    exit_.wait_for(lock, timeout, [this] { return exited_; });
  }
  abandon_.store(true, std::memory_order_release);
  inbox_.Wake();
  thread_.join();
  return !abandoned_;
}

void EngineThread::Run() {
  static const StepReport kNothing;
  std::vector<Command> commands;
  Instant wait = Instant::zero();
  Instant idle_since = kNever;
  for (;;) {
    Settle(SteadyNow());
    if (!posts_.empty()) ready_->Post(&posts_);
    const bool idle = engines_.idle();
    // Asked before Take: once closed, what Take brings is the last of it.
    const bool closed = inbox_.closed();
    if (idle) {
      // Those the policy refused for have gone, and it looks again only at the next step.
      inbox_.SetRefused(std::nullopt);
      next_load_.stats = Stats();
      Publish(SteadyNow());
      if (hooks_.on_step) hooks_.on_step(kNothing, next_load_, {});
      if (idle_since == kNever) idle_since = SteadyNow();
      const bool checks = serving_.quality != nullptr && engines_.current()->all_weights();
      wait = closed ? Instant::zero() : checks ? serving_.quality->Due(idle_since) : kNever;
      if (!closed) {
        wait = std::min(wait, engines_.TendWeights(SteadyNow()));
        if (!engines_.lost().ok()) {  // before a caller pays for it
          Lose(engines_.lost());
          break;
        }
      }
      last_progress_.store(0, std::memory_order_relaxed);
    }
    inbox_.Take(next_load_.stats.waiting, wait, &commands);
    // First: who comes after a limit was told is measured by it.
    if (const int pages = pages_wanted_.exchange(kAsTheyAre, std::memory_order_acquire);
        pages != kAsTheyAre) {
      engines_.LimitPages(pages, SteadyNow());
    }
    {
      std::lock_guard lock(memory_mutex_);
      engines_.SawMemory(memory_);
    }
    engines_.current()->CountArrivals(inbox_.TakeArrivals());
    for (Command& command : commands) Obey(command);
    DoWork();
    Settle(SteadyNow());
    if (closed) EndCheck(SteadyNow());
    if (engines_.idle() && !closed) {
      BeginCheck(SteadyNow(), idle_since);
    } else if (serving_.quality == nullptr || !serving_.quality->running().has_value()) {
      idle_since = kNever;
    }
    ready_->Post(&posts_);
    if (abandon_.load(std::memory_order_acquire)) {
      abandoned_ = !readers_.empty();
      EndAll({.cause = StreamEnd::Cause::kShutdown});
      break;
    }
    if (engines_.idle()) {
      if (closed && held_.empty()) break;
      continue;
    }

    const Instant started = SteadyNow();
    if (idle) last_progress_.store(started.count(), std::memory_order_relaxed);
    const absl::StatusOr<const StepReport*> report = engines_.Step(started);
    const Instant now = SteadyNow();
    if (!report.ok()) {
      Lose(report.status());
      break;
    }
    token_gaps_.clear();
    for (const SequenceOutput& output : (*report)->outputs) Deliver(output, now);
    ready_->Post(&posts_);
    next_load_.stats = engines_.left() == nullptr && generation_ == 0 ? (*report)->stats : Stats();
    inbox_.SetRefused(next_load_.stats.refused_priority);
    ++next_load_.steps;
    // Requests that only run out of time in the queue are no progress.
    if ((*report)->decode_rows + (*report)->prefill_rows > 0) {
      last_progress_.store(now.count(), std::memory_order_relaxed);
    }
    wait = (*report)->did_work() ? Instant::zero() : now + kStepRetry;
    Publish(now);
    if (hooks_.on_step) {
      hooks_.on_step(**report, next_load_,
                     {.step = Seconds(now - started),
                      .oldest_wait = engines_.oldest_wait_s(now),
                      .token_gaps = token_gaps_});
    }
  }
  last_progress_.store(0, std::memory_order_relaxed);
  next_load_.stats = Stats();
  Publish(SteadyNow());
  {
    std::lock_guard lock(work_mutex_);
    works_ = false;
    done_work_.notify_all();
  }
  if (on_left_) std::exchange(on_left_, {})();
  std::lock_guard lock(exit_mutex_);
  exited_ = true;
  exit_.notify_all();
}

void EngineThread::Obey(Command& command) {
  if (const auto* cancellation = std::get_if<Cancellation>(&command)) {
    const auto found = readers_.find(cancellation->id);
    if (found == readers_.end()) return;  // it has ended by itself
    if (found->second.engine != nullptr) {
      found->second.engine->Cancel(cancellation->id);
    } else {
      std::erase_if(held_, [&](const Submission& s) { return s.request.id == cancellation->id; });
    }
    readers_.erase(found);
    if (serving_.quality != nullptr) serving_.quality->Forget(cancellation->id);
    ++finishes_to_tell_;
    return;
  }
  Submit(std::move(std::get<Submission>(command)));
}

void EngineThread::Submit(Submission submission) {
  const RequestId id = submission.request.id;
  const bool current = submission.generation == generation_ || engines_.left() == nullptr;
  if (current && engines_.MustWait(submission.request)) {
    readers_.emplace(id, Reader{submission.stream});
    held_.push_back(std::move(submission));
    return;
  }
  // Read before the switch, it comes in after it, when who is left may have given its pages away.
  if (!current) engines_.MakeRoomOnLeft(submission.request, SteadyNow());
  Engine* const engine = current ? engines_.current() : engines_.left();
  QualityCheck* const quality = serving_.quality;
  if (quality != nullptr) {
    EndCheck(SteadyNow());
    if (current) quality->Watch(submission.request);
  }
  if (absl::Status status = engine->Submit(std::move(submission.request)); !status.ok()) {
    if (quality != nullptr) quality->Forget(id);
    submission.stream->End({.cause = StreamEnd::Cause::kRefused, .error = std::move(status)});
    posts_.push_back(std::move(submission.stream));
    return;
  }
  readers_.emplace(id, Reader{std::move(submission.stream), engine});
}

void EngineThread::BeginCheck(Instant now, Instant idle_since) {
  // Rungs to compare must not cost a return of weights.
  if (serving_.quality == nullptr || !engines_.current()->all_weights()) return;
  std::optional<Request> request = serving_.quality->Next(now, idle_since);
  if (request.has_value() && !engines_.current()->Submit(*std::move(request)).ok()) {
    serving_.quality->Drop();
  }
}

void EngineThread::EndCheck(Instant now) {
  if (serving_.quality == nullptr || !serving_.quality->running().has_value()) return;
  engines_.current()->Cancel(*serving_.quality->running());
  serving_.quality->Abandon(now);
}

void EngineThread::Deliver(const SequenceOutput& output, Instant now) {
  if (serving_.quality != nullptr) {
    const int64_t checks = serving_.quality->checks();
    if (serving_.quality->Take(output, now)) {
      if (serving_.quality->checks() == checks) return;
      // Nobody else is there, or the check would have been cancelled.
      engines_.current()->SetLosses(serving_.quality->losses());
      if (serving_.on_check) serving_.on_check();
      return;
    }
    serving_.quality->Follow(output);
  }
  const auto found = readers_.find(output.id);
  if (found == readers_.end()) return;
  auto& [stream, engine, last_token] = found->second;
  const bool finished = output.finish != FinishReason::kNone;
  if (!output.tokens.empty()) {
    tokens_to_tell_ += static_cast<int>(output.tokens.size());
    if (last_token != kNever) token_gaps_.push_back(Seconds(now - last_token));
    last_token = now;
  }
  bool ended = finished;
  if (!stream->Push(output, now)) {
    if (!finished) engine->Cancel(output.id);
    if (serving_.quality != nullptr) serving_.quality->Forget(output.id);
    stream->End({.cause = StreamEnd::Cause::kStalled});
    ended = true;
  } else if (finished) {
    stream->End({.cause = StreamEnd::Cause::kFinished, .reason = output.finish});
  }
  posts_.push_back(stream);
  if (!ended) return;
  ++finishes_to_tell_;
  readers_.erase(found);
}

void EngineThread::Lose(const absl::Status& status) {
  {
    // Before the inbox closes: who is turned away asks why.
    std::lock_guard lock(load_mutex_);
    lost_ = status;
  }
  inbox_.Close();
  if (hooks_.on_lost) hooks_.on_lost(status);
  std::vector<Command> late;  // what slipped in before Close
  inbox_.Take(0, Instant::zero(), &late);
  for (Command& command : late) {
    if (auto* submission = std::get_if<Submission>(&command)) {
      readers_.emplace(submission->request.id, Reader{std::move(submission->stream)});
    }
  }
  EndAll({.cause = StreamEnd::Cause::kLost, .error = status});
}

void EngineThread::EndAll(const StreamEnd& end) {
  for (auto& [id, reader] : readers_) {
    if (reader.engine != nullptr) reader.engine->Cancel(id);
    reader.stream->End(end);
    posts_.push_back(std::move(reader.stream));
  }
  readers_.clear();
  held_.clear();
  ready_->Post(&posts_);
}

void EngineThread::Publish(Instant now) {
  next_load_.weights = engines_.weights();
  if (serving_.ledger) {
    // KV of two pools is that of the pages of both, which are as large.
    next_load_.ledger = serving_.ledger(next_load_.stats);
    if (lefts_ledger_) {
      const Ledger left = lefts_ledger_({});
      next_load_.ledger.weights += left.weights;
      next_load_.ledger.weights_released += left.weights_released;
      next_load_.ledger.workspace += left.workspace;
    }
  }
  next_load_.ledger.grpc =
      kCallBytes * static_cast<uint64_t>(next_load_.stats.running + next_load_.stats.waiting);
  next_load_.arriving = inbox_.arriving();
  next_load_.draining = inbox_.closed();
  std::lock_guard lock(load_mutex_);
  if (tokens_to_tell_ > 0) tokens_.Add(std::exchange(tokens_to_tell_, 0), now);
  if (finishes_to_tell_ > 0) finishes_.Add(std::exchange(finishes_to_tell_, 0), now);
  next_load_.generated_tokens_per_second = tokens_.PerSecond(now);
  next_load_.finished_per_second = finishes_.PerSecond(now);
  load_ = next_load_;
}

}  // namespace espalier
