#include "server/engine_thread.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "server/steady_clock.h"

namespace espalier {
namespace {

// Nothing to run although something waits: look again soon, without spinning.
constexpr Instant kRetry = std::chrono::milliseconds(1);

// What a call holds of gRPC's memory, about: 3.2 MiB more with 256 that wait (overload_test).
constexpr uint64_t kCallBytes = 12 << 10;

}  // namespace

EngineThread::EngineThread(Engine* engine, ReadyQueue* ready, int max_waiting, EngineHooks hooks)
    : engine_(engine), ready_(ready), hooks_(std::move(hooks)), inbox_(max_waiting) {
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
    const bool idle = engine_->idle();
    // Asked before Take: once closed, what Take brings is the last of it.
    const bool closed = inbox_.closed();
    if (idle) {
      next_load_.stats = engine_->scheduler().stats();
      Publish(SteadyNow());
      if (hooks_.on_step) hooks_.on_step(kNothing, next_load_, {});
      if (idle_since == kNever) idle_since = SteadyNow();
      wait = closed                                                ? Instant::zero()
             : hooks_.quality != nullptr && engine_->all_weights() ? hooks_.quality->Due(idle_since)
                                                                   : kNever;
      if (!closed) wait = std::min(wait, engine_->TendWeights(SteadyNow()));
      last_progress_.store(0, std::memory_order_relaxed);
    }
    inbox_.Take(next_load_.stats.waiting, wait, &commands);
    // First: who comes after a limit was told is measured by it.
    if (const int pages = pages_wanted_.exchange(kAsTheyAre, std::memory_order_acquire);
        pages != kAsTheyAre) {
      engine_->LimitPages(pages, SteadyNow());
    }
    if (const int64_t seen = memory_seen_.load(std::memory_order_relaxed); seen != 0) {
      engine_->SawMemory(Instant(seen));
    }
    for (Command& command : commands) Obey(command);
    if (closed) EndCheck(SteadyNow());
    if (engine_->idle() && !closed) {
      BeginCheck(SteadyNow(), idle_since);
    } else if (hooks_.quality == nullptr || !hooks_.quality->running().has_value()) {
      idle_since = kNever;
    }
    ready_->Post(&posts_);
    if (abandon_.load(std::memory_order_acquire)) {
      abandoned_ = !readers_.empty();
      EndAll({.cause = StreamEnd::Cause::kShutdown});
      break;
    }
    if (engine_->idle()) {
      if (closed) break;
      continue;
    }

    const Instant started = SteadyNow();
    if (idle) last_progress_.store(started.count(), std::memory_order_relaxed);
    const absl::StatusOr<const StepReport*> report = engine_->Step(started);
    const Instant now = SteadyNow();
    if (!report.ok()) {
      Lose(report.status());
      break;
    }
    token_gaps_.clear();
    for (const SequenceOutput& output : (*report)->outputs) Deliver(output, now);
    ready_->Post(&posts_);
    next_load_.stats = (*report)->stats;
    inbox_.SetRefuses(next_load_.stats.refuses);
    ++next_load_.steps;
    // Requests that only run out of time in the queue are no progress.
    if ((*report)->decode_rows + (*report)->prefill_rows > 0) {
      last_progress_.store(now.count(), std::memory_order_relaxed);
    }
    wait = (*report)->did_work() ? Instant::zero() : now + kRetry;
    Publish(now);
    if (hooks_.on_step) {
      hooks_.on_step(**report, next_load_,
                     {.step = Seconds(now - started),
                      .oldest_wait = engine_->scheduler().Pressure(now).oldest_wait_s,
                      .token_gaps = token_gaps_});
    }
  }
  last_progress_.store(0, std::memory_order_relaxed);
  next_load_.stats = engine_->scheduler().stats();
  Publish(SteadyNow());
  std::lock_guard lock(exit_mutex_);
  exited_ = true;
  exit_.notify_all();
}

void EngineThread::Obey(Command& command) {
  if (const auto* cancellation = std::get_if<Cancellation>(&command)) {
    if (readers_.erase(cancellation->id) == 0) return;  // it has ended by itself
    engine_->Cancel(cancellation->id);
    if (hooks_.quality != nullptr) hooks_.quality->Forget(cancellation->id);
    ++finishes_to_tell_;
    return;
  }
  auto& submission = std::get<Submission>(command);
  const RequestId id = submission.request.id;
  if (hooks_.quality != nullptr) {
    EndCheck(SteadyNow());
    hooks_.quality->Watch(submission.request);
  }
  if (absl::Status status = engine_->Submit(std::move(submission.request)); !status.ok()) {
    if (hooks_.quality != nullptr) hooks_.quality->Forget(id);
    submission.stream->End({.cause = StreamEnd::Cause::kRefused, .error = std::move(status)});
    posts_.push_back(std::move(submission.stream));
    return;
  }
  readers_.emplace(id, Reader{std::move(submission.stream)});
}

void EngineThread::BeginCheck(Instant now, Instant idle_since) {
  // Rungs to compare must not cost a return of weights.
  if (hooks_.quality == nullptr || !engine_->all_weights()) return;
  std::optional<Request> request = hooks_.quality->Next(now, idle_since);
  if (request.has_value() && !engine_->Submit(*std::move(request)).ok()) {
    hooks_.quality->Drop();
  }
}

void EngineThread::EndCheck(Instant now) {
  if (hooks_.quality == nullptr || !hooks_.quality->running().has_value()) return;
  engine_->Cancel(*hooks_.quality->running());
  hooks_.quality->Abandon(now);
}

void EngineThread::Deliver(const SequenceOutput& output, Instant now) {
  if (hooks_.quality != nullptr) {
    const int64_t checks = hooks_.quality->checks();
    if (hooks_.quality->Take(output, now)) {
      if (hooks_.quality->checks() > checks && hooks_.on_check) hooks_.on_check();
      return;
    }
    hooks_.quality->Follow(output);
  }
  const auto found = readers_.find(output.id);
  if (found == readers_.end()) return;
  auto& [stream, last_token] = found->second;
  const bool finished = output.finish != FinishReason::kNone;
  if (!output.tokens.empty()) {
    tokens_to_tell_ += static_cast<int>(output.tokens.size());
    if (last_token != kNever) token_gaps_.push_back(Seconds(now - last_token));
    last_token = now;
  }
  bool ended = finished;
  if (!stream->Push(output, now)) {
    if (!finished) engine_->Cancel(output.id);
    if (hooks_.quality != nullptr) hooks_.quality->Forget(output.id);
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
    engine_->Cancel(id);
    reader.stream->End(end);
    posts_.push_back(std::move(reader.stream));
  }
  readers_.clear();
  ready_->Post(&posts_);
}

void EngineThread::Publish(Instant now) {
  next_load_.weights = engine_->weights();
  if (hooks_.ledger) next_load_.ledger = hooks_.ledger(next_load_.stats);
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
