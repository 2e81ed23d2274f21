#include "server/rpc_error.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "engine/model/text/tokenizer.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace espalier {
namespace {

using std::chrono::milliseconds;

constexpr std::string_view kDomain = "espalier";
constexpr milliseconds kMinRetry{50};
constexpr milliseconds kMaxRetry{60'000};
// Loading and draining take as long as they take; a balancer should ask others meanwhile.
constexpr milliseconds kStateRetry{1'000};
// Whether newcomers are refused is decided in each step, whatever the queue's length.
constexpr milliseconds kOverloadRetry{2'000};

// Collects the details of one status.
class StatusBuilder {
 public:
  StatusBuilder(grpc::StatusCode code, std::string message) {
    status_.set_code(code);
    status_.set_message(std::move(message));
  }

  StatusBuilder& Violation(const FieldViolation& violation) {
    auto* added = bad_request_.add_field_violations();
    added->set_field(violation.field);
    added->set_description(violation.description);
    return *this;
  }

  StatusBuilder& Reason(
      std::string_view reason,
      std::initializer_list<std::pair<std::string_view, std::string>> numbers = {}) {
    google::rpc::ErrorInfo info;
    info.set_reason(std::string(reason));
    info.set_domain(std::string(kDomain));
    for (const auto& [name, value] : numbers) (*info.mutable_metadata())[std::string(name)] = value;
    status_.add_details()->PackFrom(info);
    return *this;
  }

  StatusBuilder& Quota(std::string_view subject, std::string description) {
    google::rpc::QuotaFailure failure;
    auto* violation = failure.add_violations();
    violation->set_subject(std::string(subject));
    violation->set_description(std::move(description));
    status_.add_details()->PackFrom(failure);
    return *this;
  }

  StatusBuilder& RetryAfter(milliseconds delay) {
    google::rpc::RetryInfo info;
    info.mutable_retry_delay()->set_seconds(delay.count() / 1000);
    info.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % 1000 * 1'000'000));
    status_.add_details()->PackFrom(info);
    retry_after_ = delay;
    return *this;
  }

  RpcError Build(std::string_view outcome) {
    if (bad_request_.field_violations_size() > 0) status_.add_details()->PackFrom(bad_request_);
    return {grpc::Status(static_cast<grpc::StatusCode>(status_.code()), status_.message(),
                         status_.SerializeAsString()),
            outcome, retry_after_};
  }

 private:
  google::rpc::Status status_;
  google::rpc::BadRequest bad_request_;
  std::optional<milliseconds> retry_after_;
};

}  // namespace

RpcError BadFields(const std::vector<FieldViolation>& violations) {
  StatusBuilder builder(
      grpc::StatusCode::INVALID_ARGUMENT,
      fmt::format("{}: {}", violations.front().field, violations.front().description));
  for (const FieldViolation& violation : violations) builder.Violation(violation);
  return builder.Build("invalid_argument");
}

RpcError NeverFits(FieldViolation violation, int max_sequence_tokens) {
  return StatusBuilder(grpc::StatusCode::OUT_OF_RANGE,
                       fmt::format("{}: {}", violation.field, violation.description))
      .Violation(violation)
      .Reason("NEVER_FITS", {{"max_sequence_tokens", fmt::format("{}", max_sequence_tokens)}})
      .Build("out_of_range");
}

RpcError UnknownModel(std::string_view asked, std::string_view served) {
  return StatusBuilder(grpc::StatusCode::NOT_FOUND,
                       // Cut and escaped: what a caller sends is echoed in one bounded line.
                       fmt::format("model: expected \"{}\" or empty, got {:?}", served,
                                   asked.substr(0, ValidUtf8Prefix(asked.substr(0, 64)))))
      .Build("not_found");
}

RpcError QueueFull(const LoadSnapshot& load) {
  return StatusBuilder(grpc::StatusCode::RESOURCE_EXHAUSTED,
                       fmt::format("the queue is full: {} requests wait, {} may", load.waiting(),
                                   load.max_waiting))
      .RetryAfter(RetryDelay(load))
      .Quota("requests waiting", fmt::format("at most {} may wait", load.max_waiting))
      .Reason("QUEUE_FULL",
              {{"waiting", fmt::format("{}", load.waiting())},
               {"max_waiting", fmt::format("{}", load.max_waiting)},
               {"running", fmt::format("{}", load.stats.running)},
               {"kv_utilization", fmt::format("{:.3f}", load.kv_utilization())},
               {"finished_per_second", fmt::format("{:.3f}", load.finished_per_second)}})
      .Build("queue_full");
}

RpcError Overloaded(const LoadSnapshot& load) {
  return StatusBuilder(grpc::StatusCode::RESOURCE_EXHAUSTED,
                       fmt::format("overloaded: {} requests wait too long already, at rung {}, the "
                                   "hardest there may be",
                                   load.waiting(), load.stats.wanted_rung))
      .RetryAfter(std::min(RetryDelay(load), kOverloadRetry))
      .Reason("OVERLOADED", {{"waiting", fmt::format("{}", load.waiting())},
                             {"rung", fmt::format("{}", load.stats.wanted_rung)}})
      .Build("overloaded");
}

RpcError NoMemory(std::string_view cause) {
  return StatusBuilder(grpc::StatusCode::RESOURCE_EXHAUSTED, std::string(cause))
      .RetryAfter(kStateRetry)
      .Reason("NO_MEMORY")
      .Build("no_memory");
}

RpcError NotAdmin() {
  return StatusBuilder(grpc::StatusCode::PERMISSION_DENIED,
                       "the server was not started with --admin")
      .Reason("NOT_ADMIN")
      .Build("permission_denied");
}

RpcError DecidesNothing(std::string_view policy) {
  return StatusBuilder(grpc::StatusCode::FAILED_PRECONDITION,
                       fmt::format("policy {}: it decides nothing", policy))
      .Reason("FIXED_POLICY")
      .Build("failed_precondition");
}

RpcError NotReloaded(std::string_view field, const absl::Status& cause) {
  constexpr size_t kLongest = 1500;  // it travels three times, within 8 KiB
  const std::string_view whole(cause.message().data(), cause.message().size());
  const std::string message(whole.substr(0, ValidUtf8Prefix(whole.substr(0, kLongest))));
  StatusBuilder builder(static_cast<grpc::StatusCode>(cause.code()),
                        field.empty() ? message : fmt::format("{}: {}", field, message));
  if (!field.empty()) builder.Violation({std::string(field), message});
  return builder.Build("not_reloaded");
}

RpcError Reloading() {
  return StatusBuilder(grpc::StatusCode::ABORTED,
                       "a reload is under way, or requests of before the last one still run")
      .RetryAfter(kStateRetry)
      .Reason("RELOADING")
      .Build("reloading");
}

RpcError ReaderStalled(int buffer_tokens) {
  return StatusBuilder(grpc::StatusCode::RESOURCE_EXHAUSTED,
                       fmt::format("the stream was not read: {} tokens waited", buffer_tokens))
      .Reason("READER_STALLED", {{"stream_buffer_tokens", fmt::format("{}", buffer_tokens)}})
      .Build("reader_stalled");
}

RpcError Loading() {
  return StatusBuilder(grpc::StatusCode::UNAVAILABLE, "the model is being loaded")
      .RetryAfter(kStateRetry)
      .Reason("LOADING")
      .Build("loading");
}

RpcError Draining() {
  return StatusBuilder(grpc::StatusCode::UNAVAILABLE, "the server shuts down")
      .RetryAfter(kStateRetry)
      .Reason("DRAINING")
      .Build("draining");
}

RpcError EngineLost(const absl::Status& cause, bool tokens_sent) {
  StatusBuilder builder(
      tokens_sent ? grpc::StatusCode::INTERNAL : grpc::StatusCode::UNAVAILABLE,
      fmt::format("the engine failed: {}",
                  std::string_view(cause.message().data(), cause.message().size())));
  builder.Reason("ENGINE_LOST");
  if (!tokens_sent) builder.RetryAfter(kStateRetry);
  return builder.Build(tokens_sent ? "internal" : "unavailable");
}

RpcError DeadlineExceeded() {
  return StatusBuilder(grpc::StatusCode::DEADLINE_EXCEEDED, "the call's deadline has passed")
      .Build("deadline");
}

RpcError Cancelled() {
  return StatusBuilder(grpc::StatusCode::CANCELLED, "the caller went away").Build("cancelled");
}

RpcError Refused(const absl::Status& cause, int max_sequence_tokens) {
  const std::string message(cause.message().data(), cause.message().size());
  if (cause.code() == absl::StatusCode::kOutOfRange) {
    return NeverFits({"stop.max_tokens", message}, max_sequence_tokens);
  }
  if (cause.code() == absl::StatusCode::kResourceExhausted) return NoMemory(message);
  return StatusBuilder(static_cast<grpc::StatusCode>(cause.code()), message).Build("internal");
}

milliseconds RetryDelay(const LoadSnapshot& load) {
  const double seconds = load.waiting() / std::max(load.finished_per_second, 1e-3);
  return std::clamp(milliseconds(std::llround(std::min(seconds, 60.0) * 1000)), kMinRetry,
                    kMaxRetry);
}

}  // namespace espalier
