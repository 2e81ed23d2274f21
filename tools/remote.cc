#include "tools/remote.h"

#include <fmt/format.h>
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>

#include <chrono>

#include <CLI/CLI.hpp>

#include "tools/value_checks.h"

namespace espalier {

void AddRemoteOptions(CLI::App& sub, RemoteOptions* options) {
  sub.add_option("--address", options->address,
                 "Server to call, as gRPC writes it: HOST:PORT or unix:PATH")
      ->type_name("TARGET")
      ->capture_default_str()
      ->group("Server");
  sub.add_option("--model-name", options->model_name,
                 "Refuse to be served by another model than this; empty: any")
      ->type_name("NAME")
      ->group("Server");
  sub.add_option("--deadline", options->deadline, "Time for a whole call, seconds; 0: no limit")
      ->type_name("SECONDS")
      ->check(Within(0, 1e6))
      ->capture_default_str()
      ->group("Server");
}

std::shared_ptr<grpc::Channel> Connect(const RemoteOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);  // a long text's log-probabilities are many
  return grpc::CreateCustomChannel(options.address, grpc::InsecureChannelCredentials(), arguments);
}

void Limit(const RemoteOptions& options, grpc::ClientContext* context) {
  if (options.deadline <= 0) return;
  context->set_deadline(std::chrono::system_clock::now() +
                        std::chrono::microseconds(static_cast<int64_t>(options.deadline * 1e6)));
}

std::string CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {"OK",
                                           "CANCELLED",
                                           "UNKNOWN",
                                           "INVALID_ARGUMENT",
                                           "DEADLINE_EXCEEDED",
                                           "NOT_FOUND",
                                           "ALREADY_EXISTS",
                                           "PERMISSION_DENIED",
                                           "RESOURCE_EXHAUSTED",
                                           "FAILED_PRECONDITION",
                                           "ABORTED",
                                           "OUT_OF_RANGE",
                                           "UNIMPLEMENTED",
                                           "INTERNAL",
                                           "UNAVAILABLE",
                                           "DATA_LOSS",
                                           "UNAUTHENTICATED"};
  const size_t index = static_cast<size_t>(code);
  return index < std::size(kNames) ? kNames[index] : fmt::format("code {}", index);
}

double RetryAfter(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return -1;
  for (const google::protobuf::Any& detail : details.details()) {
    google::rpc::RetryInfo retry;
    if (detail.UnpackTo(&retry)) {
      const google::protobuf::Duration& delay = retry.retry_delay();
      return static_cast<double>(delay.seconds()) + delay.nanos() * 1e-9;
    }
  }
  return -1;
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  std::string text = fmt::format("{}: {}", CodeName(status.error_code()), status.error_message());
  if (const double wait = RetryAfter(status); wait >= 0) {
    text += fmt::format(" (try again in {:.3g} s)", wait);
  }
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), text);
}

}  // namespace espalier
