// A server at the other end: its address, a call's limits, and gRPC's errors as ours.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "espalier/v1/espalier.grpc.pb.h"

namespace CLI {
class App;
}

namespace espalier {

struct RemoteOptions {
  std::string address = "127.0.0.1:50051";
  std::string model_name;  // empty: whatever is served
  double deadline = 0;     // seconds for the whole call; 0: none
};

// --address, --model-name, --deadline.
void AddRemoteOptions(CLI::App& sub, RemoteOptions* options);

std::shared_ptr<grpc::Channel> Connect(const RemoteOptions& options);

// Sets the call's deadline, counted from now.
void Limit(const RemoteOptions& options, grpc::ClientContext* context);

// "RESOURCE_EXHAUSTED".
std::string CodeName(grpc::StatusCode code);

// OK, or one line: code, message, and when to try again if the server says so.
absl::Status FromGrpc(const grpc::Status& status);

// How long the server asks to wait before trying again, seconds; negative if it does not say.
double RetryAfter(const grpc::Status& status);

// Calls one unary method, e.g. UnaryCall(options, &Stub::Tokenize, request, &response).
template <typename Request, typename Response>
absl::Status UnaryCall(const RemoteOptions& options,
                       grpc::Status (v1::EspalierService::Stub::*method)(grpc::ClientContext*,
                                                                         const Request&, Response*),
                       const Request& request, Response* response) {
  grpc::ClientContext context;
  Limit(options, &context);
  const std::unique_ptr<v1::EspalierService::Stub> stub =
      v1::EspalierService::NewStub(Connect(options));
  return FromGrpc((stub.get()->*method)(&context, request, response));
}

}  // namespace espalier
