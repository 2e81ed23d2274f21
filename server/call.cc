#include "server/call.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "server/steady_clock.h"

namespace espalier {
namespace {

std::atomic<RequestId> next_id{1};

// The call's deadline on the steady clock.
Instant SteadyDeadline(std::chrono::system_clock::time_point deadline, Instant now) {
  // As far away as this is no deadline; adding it could overflow.
  constexpr auto kFar = std::chrono::hours(24 * 365);
  const auto left = deadline - std::chrono::system_clock::now();
  if (deadline == std::chrono::system_clock::time_point::max() || left > kFar) return kNever;
  return now + std::chrono::duration_cast<Instant>(left);
}

}  // namespace

google::protobuf::Duration WireDuration(double seconds) {
  const auto nanos = static_cast<int64_t>(std::max(seconds, 0.0) * 1e9);
  google::protobuf::Duration duration;
  duration.set_seconds(nanos / 1'000'000'000);
  duration.set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  return duration;
}

void CallCount::Add(int calls) {
  std::lock_guard lock(mutex_);
  calls_ += calls;
  if (calls_ == 0) none_.notify_all();
}

bool CallCount::WaitForNone(Instant until, Instant patience) {
  std::unique_lock lock(mutex_);
  for (;;) {
    const uint64_t written = written_.load(std::memory_order_relaxed);
    const int calls = calls_;
    const Instant limit = std::min(until, SteadyNow() + patience);
    if (none_.wait_until(lock, std::chrono::steady_clock::time_point(limit),
                         [this] { return calls_ == 0; })) {
      return true;
    }
    const bool nobody_reads =
        calls_ == calls && written_.load(std::memory_order_relaxed) == written;
    if (nobody_reads || limit == until) return false;
  }
}

Call::Call(const CallOptions* options, const Backstage* backstage,
           grpc::CallbackServerContext* context, std::string_view method)
    : options_(options), backstage_(backstage), context_(context), arrival_(SteadyNow()) {
  summary.id = next_id.fetch_add(1, std::memory_order_relaxed);
  summary.method = method;
  summary.peer = context->peer();
  options_->count->Add(1);
}

std::optional<RpcError> Call::Admit(int priority) {
  if (backstage_ == nullptr) return Loading();
  if (SteadyDeadline(context_->deadline(), arrival_) <= arrival_) return DeadlineExceeded();
  int waiting = 0;
  absl::StatusOr<Reservation> place = backstage_->engine->inbox().Reserve(priority, &waiting);
  if (absl::IsResourceExhausted(place.status())) {
    LoadSnapshot load = backstage_->engine->load();
    load.arriving = waiting - load.stats.waiting;  // as it was when the call was refused
    return waiting < load.max_waiting ? Overloaded(load) : QueueFull(load);
  }
  if (!place.ok()) return Closed();
  place_.emplace(*std::move(place));
  model_ = backstage_->models->of(place_->generation());
  return std::nullopt;
}

std::optional<RpcError> Call::Submit(Request request, size_t stream_capacity,
                                     std::weak_ptr<StreamReader> reader) {
  request.id = summary.id;
  request.arrival = arrival_;
  request.deadline = SteadyDeadline(context_->deadline(), SteadyNow());
  summary.prompt_tokens = static_cast<int>(request.prompt.size());
  summary.max_tokens = request.stop.max_tokens;
  summary.rung_by = request.bounds.rung.has_value() ? "request" : model().policy;
  by_policy_ = !request.bounds.rung.has_value();
  stream_ = std::make_shared<TokenStream>(summary.id, stream_capacity, std::move(reader));
  const bool taken = (*std::move(place_)).Submit({std::move(request), stream_});
  if (!taken) return Closed();
  return std::nullopt;
}

void Call::Cancel() {
  cancelled_.store(true, std::memory_order_release);
  if (stream_ != nullptr) StopEngine();
}

RpcError Call::Gone() const {
  // We cut it off.
  if (stream_ != nullptr && stream_->stalled()) return Stalled();
  // A client gives up at its own deadline, which is ours less the way here.
  constexpr auto kWay = std::chrono::milliseconds(100);
  const bool late = context_->deadline() <= std::chrono::system_clock::now() + kWay;
  return late ? DeadlineExceeded() : Cancelled();
}

RpcError Call::Closed() const {
  const absl::Status lost = backstage_->engine->lost();
  return lost.ok() ? Draining() : EngineLost(lost, /*tokens_sent=*/false);
}

RpcError Call::Stalled() const {
  return ReaderStalled(static_cast<int>(options_->stream_buffer_tokens));
}

std::optional<RpcError> Call::ErrorOf(const StreamEnd& end) const {
  switch (end.cause) {
    case StreamEnd::Cause::kRefused:
      return Refused(end.error, model().max_sequence_tokens);
    case StreamEnd::Cause::kStalled:
      return Stalled();
    case StreamEnd::Cause::kLost:
      return EngineLost(end.error, summary.output_tokens > 0);
    case StreamEnd::Cause::kShutdown:
      return Draining();
    case StreamEnd::Cause::kFinished:
      break;
  }
  if (end.reason == FinishReason::kDeadline) return DeadlineExceeded();
  if (end.reason == FinishReason::kCancelled) return Gone();
  return std::nullopt;
}

void Call::Note(const StreamProgress& progress) {
  const auto since_arrival = [this](Instant then, double* seconds) {
    if (then != kNever) *seconds = Seconds(then - arrival_);
  };
  since_arrival(progress.first_scheduled, &summary.queue_s);
  since_arrival(progress.first_token, &summary.first_token_s);
  since_arrival(progress.last_token, &summary.last_token_s);
  summary.cached_tokens = progress.cached_tokens;
  summary.preemptions = progress.preemptions;
  summary.rung = progress.rung;
  summary.stages = progress.stages;
  summary.rung_tokens = progress.rung_tokens;
  if (by_policy_ && !progress.reason.empty()) {
    summary.rung_by = fmt::format("{}: {}", model().policy, progress.reason);
  }
  const Ladder& ladder = model().ladder;
  double tokens = 0, ratio = 0;
  for (int rung = 0; rung < ladder.size(); ++rung) {
    tokens += progress.rung_tokens[rung];
    if (progress.rung_tokens[rung] == 0) continue;
    ratio += progress.rung_tokens[rung] * ladder.rung(rung).decode.prune_ratio();
  }
  const Rung& last = ladder.rung(progress.rung);  // of what is only scored
  summary.mean_prune_ratio = tokens > 0 ? ratio / tokens : last.decode.prune_ratio();
  summary.estimated_loss = tokens > 0 ? progress.told_loss / tokens : progress.rung_loss;
}

grpc::Status Call::End(const RpcError& error) {
  place_.reset();
  if (error.retry_after.has_value()) {
    context_->AddTrailingMetadata("grpc-retry-pushback-ms",
                                  fmt::format("{}", error.retry_after->count()));
  }
  summary.outcome = error.outcome;
  summary.error = error.status.error_message();
  Report();
  return error.status;
}

grpc::Status Call::EndWell(FinishReason reason) {
  summary.outcome = FinishReasonName(reason);
  Report();
  return grpc::Status::OK;
}

void Call::Report() {
  summary.total_s = Seconds(SteadyNow() - arrival_);
  if (options_->on_finished) options_->on_finished(summary);
}

v1::Times Call::WireTimes() const {
  v1::Times times;
  *times.mutable_queue() = WireDuration(summary.queue_s);
  *times.mutable_first_token() = WireDuration(summary.first_token_s);
  *times.mutable_per_token() = WireDuration(summary.per_token_s());
  return times;
}

v1::Served Call::WireServed(int tokens) const {
  v1::Served served;
  const auto add = [&](int rung, int count) {
    v1::RungUse* use = served.add_rungs();
    use->set_rung(rung);
    use->set_tokens(count);
  };
  // Tokens behind a stop string were drawn, but are not told of.
  int left = tokens;
  for (int rung = 0; rung < kMostRungs; ++rung) {
    const int count = std::min<int>(left, summary.rung_tokens[rung]);
    left -= count;
    if (count > 0) add(rung, count);
  }
  if (tokens == 0) add(summary.rung, 0);
  served.set_mean_prune_ratio(static_cast<float>(summary.mean_prune_ratio));
  served.set_estimated_loss(static_cast<float>(summary.estimated_loss));
  served.set_reason(std::string(summary.rung_by));
  v1::StageRows* stages = served.mutable_stages();
  stages->set_full(summary.stages.full);
  stages->set_probed(summary.stages.probed);
  stages->set_history(summary.stages.history);
  return served;
}

v1::Usage Call::WireUsage() const {
  v1::Usage usage;
  usage.set_prompt_tokens(summary.prompt_tokens);
  usage.set_cached_tokens(summary.cached_tokens);
  usage.set_completion_tokens(summary.output_tokens);
  return usage;
}

}  // namespace espalier
