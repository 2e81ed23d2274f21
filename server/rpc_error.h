// How a call fails: the gRPC status, its details for programs, and when to try again.
//
// Details travel as google.rpc.Status in grpc-status-details-bin; the delay also as the trailer
// grpc-retry-pushback-ms, which gRPC's own retry obeys.
#pragma once

#include <grpcpp/support/status.h>

#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/load_snapshot.h"

namespace espalier {

struct RpcError {
  grpc::Status status;
  std::string_view outcome;  // RequestSummary::outcome
  std::optional<std::chrono::milliseconds> retry_after;
};

struct FieldViolation {
  std::string field;  // path within the request, e.g. "sampling.top_p"
  std::string description;
};

// INVALID_ARGUMENT with BadRequest; `violations` is not empty.
RpcError BadFields(const std::vector<FieldViolation>& violations);
// OUT_OF_RANGE with BadRequest: prompt + output can never fit `max_sequence_tokens`.
RpcError NeverFits(FieldViolation violation, int max_sequence_tokens);
// NOT_FOUND.
RpcError UnknownModel(std::string_view asked, std::string_view served);
// RESOURCE_EXHAUSTED with RetryInfo, QuotaFailure and ErrorInfo (QUEUE_FULL and live numbers).
RpcError QueueFull(const LoadSnapshot& load);
// RESOURCE_EXHAUSTED with RetryInfo and ErrorInfo (NO_MEMORY): it would fit, were there as much as
// the server began with.
RpcError NoMemory(std::string_view cause);
// PERMISSION_DENIED with ErrorInfo (NOT_ADMIN).
RpcError NotAdmin();
// FAILED_PRECONDITION with ErrorInfo (FIXED_POLICY).
RpcError DecidesNothing(std::string_view policy);
// Why a model was not reloaded: the cause's code, with BadRequest if it names a field of the
// request.
RpcError NotReloaded(std::string_view field, const absl::Status& cause);
// ABORTED with RetryInfo and ErrorInfo (RELOADING): one is under way, or requests of before the
// last still run.
RpcError Reloading();
// RESOURCE_EXHAUSTED with RetryInfo and ErrorInfo (OVERLOADED): the policy may prune no harder for
// what presses (LadderPolicyOptions::load_loss), and requests wait too long already.
RpcError Overloaded(const LoadSnapshot& load);
// RESOURCE_EXHAUSTED with ErrorInfo (READER_STALLED) and no RetryInfo: the caller is to blame.
RpcError ReaderStalled(int buffer_tokens);
// UNAVAILABLE with RetryInfo and ErrorInfo (LOADING, DRAINING).
RpcError Loading();
RpcError Draining();
// The device failed: UNAVAILABLE if nothing was sent yet, so that another server may try; else
// INTERNAL, which nobody retries.
RpcError EngineLost(const absl::Status& cause, bool tokens_sent);
RpcError DeadlineExceeded();
RpcError Cancelled();
// What the scheduler refused in spite of all checks before it.
RpcError Refused(const absl::Status& cause, int max_sequence_tokens);

// How long until a place in the queue is likely free: the waiting over the measured rate at which
// requests end; 50 ms to 60 s.
std::chrono::milliseconds RetryDelay(const LoadSnapshot& load);

}  // namespace espalier
