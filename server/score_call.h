// One Score call: log-probabilities gathered from its stream, one answer.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <memory>

#include "server/call.h"

namespace espalier {

class ScoreCall final : public grpc::ServerUnaryReactor,
                        public StreamReader,
                        public std::enable_shared_from_this<ScoreCall> {
 public:
  // Begins the call; gRPC owns the result until OnDone.
  static ScoreCall* Start(const CallOptions* options, const Backstage* backstage,
                          grpc::CallbackServerContext* context, const v1::ScoreRequest& message,
                          v1::ScoreResponse* response);

  ScoreCall(const CallOptions* options, const Backstage* backstage,
            grpc::CallbackServerContext* context, v1::ScoreResponse* response)
      : call_(options, backstage, context, "Score"), response_(response) {}

  void OnReady() override { Pump(); }
  void OnCancel() override;
  void OnDone() override;

 private:
  std::optional<RpcError> Begin(const v1::ScoreRequest& message);
  // Behind the gate, as in GenerateCall: takes what waits; at the end finishes, and never leaves.
  void Pump();

  Call call_;
  v1::ScoreResponse* const response_;
  std::shared_ptr<ScoreCall> self_;  // until OnDone
};

}  // namespace espalier
