#include "tools/load_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_set>
#include <utility>

#include "tools/interrupt.h"

namespace espalier {
namespace {

// Prompts are drawn from the seed itself.
std::vector<double> ArrivalsOf(const LoadShape& shape) {
  return PoissonArrivals(shape.rate, shape.duration, shape.requests, shape.seed + 1);
}

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

class Generator;

// One call, its own until it has ended.
class Call final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Call(Generator* generator, v1::EspalierService::Stub* stub, const RemoteOptions& remote,
       v1::GenerateRequest request);

  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;
  void Cancel() { context_.TryCancel(); }

  bool may_be_good(const LoadShape& shape) const {
    return MayBeGood(shape, Seconds(Clock::now() - start_), first_token_);
  }
  const StreamTimes& times() const { return times_; }
  bool past_deadline() const { return past_deadline_; }
  const v1::Finished& finished() const { return finished_; }  // if it did

 private:
  Generator* generator_;
  v1::GenerateRequest request_;
  v1::GenerateResponse response_;
  grpc::ClientContext context_;
  double deadline_;
  bool past_deadline_ = false;
  StreamTimes times_;
  std::atomic<double> first_token_{-1};  // of times_, for others to see
  v1::Finished finished_;
  Clock::time_point start_ = Clock::now();
};

// Begins calls and gathers how they end.
class Generator {
 public:
  Generator(v1::EspalierService::Stub* stub, const RemoteOptions& remote, const LoadShape& shape)
      : stub_(stub), remote_(remote), shape_(shape), random_(shape.seed) {}

  LoadReport Run(const std::function<void(int64_t, int64_t)>& progress);
  void Ended(std::unique_ptr<Call> call, const grpc::Status& status);

 private:
  v1::GenerateRequest RandomRequest();
  void Begin();
  void CancelAll();

  v1::EspalierService::Stub* stub_;
  const RemoteOptions& remote_;
  const LoadShape& shape_;
  std::mt19937_64 random_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_set<Call*> in_flight_;  // guarded, as all below
  bool stopping_ = false;
  int ended_ = 0;
  LoadReport report_;
};

Call::Call(Generator* generator, v1::EspalierService::Stub* stub, const RemoteOptions& remote,
           v1::GenerateRequest request)
    : generator_(generator), request_(std::move(request)), deadline_(remote.deadline) {
  Limit(remote, &context_);
  stub->async()->Generate(&context_, &request_, this);
  StartRead(&response_);
  // The caller starts the call once it is on the books.
}

void Call::OnReadDone(bool ok) {
  if (!ok) return;
  const double now = Seconds(Clock::now() - start_);
  if (response_.token_ids_size() > 0) {
    if (times_.tokens == 0) first_token_ = times_.first_token = now;
    times_.last_token = now;
    times_.tokens += response_.token_ids_size();
    past_deadline_ |= deadline_ > 0 && now > deadline_;
  }
  if (response_.has_finished()) finished_ = response_.finished();
  StartRead(&response_);
}

void Call::OnDone(const grpc::Status& status) {
  times_.end = Seconds(Clock::now() - start_);
  past_deadline_ |= status.ok() && deadline_ > 0 && times_.end > deadline_;
  generator_->Ended(std::unique_ptr<Call>(this), status);
}

v1::GenerateRequest Generator::RandomRequest() {
  v1::GenerateRequest request;
  request.set_model(remote_.model_name);
  std::uniform_int_distribution<int32_t> token(0, shape_.vocabulary - 1);
  for (int i = 0; i < shape_.prompt_tokens; ++i) {
    request.mutable_token_ids()->add_ids(token(random_));
  }
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stop()->set_max_tokens(shape_.max_tokens);
  request.set_priority(shape_.priority);
  if (shape_.rung >= 0) request.mutable_prune()->set_rung(shape_.rung);
  request.mutable_stop()->set_ignore_eos(true);
  return request;
}

void Generator::Begin() {
  Call* call = new Call(this, stub_, remote_, RandomRequest());
  {
    const std::lock_guard lock(mutex_);
    in_flight_.insert(call);
    ++report_.started;
    if (stopping_) call->Cancel();
  }
  call->StartCall();
}

void Generator::Ended(std::unique_ptr<Call> call, const grpc::Status& status) {
  const StreamTimes& times = call->times();
  const std::lock_guard lock(mutex_);
  in_flight_.erase(call.get());
  ++ended_;
  report_.tokens += times.tokens;
  report_.past_deadline += call->past_deadline();
  if (times.tokens > 0) report_.first_token.push_back(times.first_token);
  if (times.tokens > 1) report_.per_token.push_back(times.per_token());
  if (status.ok()) {
    ++report_.finished;
    const v1::Finished& finished = call->finished();
    report_.prompt_tokens += finished.usage().prompt_tokens();
    report_.cached_tokens += finished.usage().cached_tokens();
    for (const v1::RungUse& use : finished.served().rungs()) {
      report_.rung_tokens[use.rung()] += use.tokens();
    }
    report_.told_loss += finished.served().estimated_loss() * finished.usage().completion_tokens();
    const auto within = [](double seconds, double target) {
      return target == 0 || seconds <= target;
    };
    report_.good += within(times.first_token, shape_.ttft_target) &&
                    within(times.per_token(), shape_.tpot_target);
    report_.end.push_back(times.end);
  } else {
    Refusals& refusals = report_.refusals[CodeName(status.error_code())];
    ++refusals.calls;
    refusals.with_retry_info += RetryAfter(status) >= 0;
    if (refusals.example.empty()) refusals.example = status.error_message();
  }
  // While Run waits for the lock: if the caller's stub went first, the call's would be the
  // channel's last reference, and gRPC's thread would end itself in it.
  call.reset();
  changed_.notify_all();
}

void Generator::CancelAll() {
  const std::lock_guard lock(mutex_);
  stopping_ = true;
  for (Call* call : in_flight_) call->Cancel();
  changed_.notify_all();
}

LoadReport Generator::Run(const std::function<void(int64_t, int64_t)>& progress) {
  const std::vector<double> arrivals = shape_.rate > 0 ? ArrivalsOf(shape_) : std::vector<double>();
  const int total = shape_.rate > 0 ? static_cast<int>(arrivals.size()) : shape_.requests;
  const Interrupt interrupt([this] { CancelAll(); });
  const Clock::time_point begin = Clock::now();
  const auto from_begin = [&](double seconds) {
    return begin +
           std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  };
  std::unique_lock lock(mutex_);
  for (int next = 0; next < total && !stopping_; ++next) {
    // Waits for the next call's turn, waking now and then for the progress bar.
    const auto its_turn = [&] {
      return shape_.rate > 0 ? Clock::now() >= from_begin(arrivals[next])
                             : static_cast<int>(in_flight_.size()) < shape_.concurrency;
    };
    while (!stopping_ && !its_turn()) {
      Clock::time_point wake = Clock::now() + std::chrono::milliseconds(100);
      if (shape_.rate > 0) wake = std::min(wake, from_begin(arrivals[next]));
      changed_.wait_until(lock, wake);
      progress(ended_, total);
    }
    if (stopping_ || (shape_.duration > 0 && Clock::now() > from_begin(shape_.duration))) {
      break;
    }
    lock.unlock();
    Begin();
    lock.lock();
  }
  while (!in_flight_.empty()) {
    changed_.wait_for(lock, std::chrono::milliseconds(100));
    progress(ended_, total);
    if (shape_.give_up && !stopping_ && std::ranges::none_of(in_flight_, [this](Call* call) {
          return call->may_be_good(shape_);
        })) {
      stopping_ = true;
      for (Call* call : in_flight_) call->Cancel();
    }
  }
  report_.seconds = Seconds(Clock::now() - begin);
  return report_;
}

}  // namespace

bool MayBeGood(const LoadShape& shape, double age, double first_token) {
  constexpr double kLate = 0.5;
  const auto within = [](double seconds, double target) {
    return target == 0 || seconds <= target;
  };
  if (first_token < 0) return within(age - kLate, shape.ttft_target);
  return within(first_token, shape.ttft_target) &&
         (shape.tpot_target == 0 ||
          age - kLate <= first_token + shape.tpot_target * (shape.max_tokens - 1));
}

std::string TrafficOf(const LoadShape& shape) {
  std::string text;
  for (const double at : ArrivalsOf(shape)) {
    text += fmt::format("call {:.6f} {} {} {}\n", at, shape.prompt_tokens, shape.max_tokens,
                        shape.priority);
  }
  return text;
}

std::vector<double> PoissonArrivals(double rate, double duration, int requests, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::exponential_distribution<double> gap(rate);
  std::vector<double> arrivals;
  for (double at = gap(random); static_cast<int>(arrivals.size()) < requests; at += gap(random)) {
    if (duration > 0 && at >= duration) break;
    arrivals.push_back(at);
  }
  return arrivals;
}

LoadReport RunLoad(v1::EspalierService::Stub* stub, const RemoteOptions& remote,
                   const LoadShape& shape,
                   const std::function<void(int64_t done, int64_t total)>& progress) {
  return Generator(stub, remote, shape).Run(progress);
}

}  // namespace espalier
