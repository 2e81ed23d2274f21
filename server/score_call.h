// One Score call: log-probabilities gathered from its stream, one answer.
#pragma once

#include <grpcpp/support/byte_buffer.h>
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
                          grpc::CallbackServerContext* context, const grpc::ByteBuffer& request,
                          grpc::ByteBuffer* response);

  ScoreCall(const CallOptions* options, const Backstage* backstage,
            grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : call_(options, backstage, context, "Score"), wire_(response) {}

  void OnReady() override { Pump(); }
  void OnCancel() override;
  void OnDone() override;

 private:
  std::optional<RpcError> Begin(const grpc::ByteBuffer& bytes);
  // Behind the gate, as in GenerateCall: takes what waits; at the end finishes, and never leaves.
  void Pump();

  Call call_;
  v1::ScoreResponse response_;
  grpc::ByteBuffer* const wire_;
  std::shared_ptr<ScoreCall> self_;  // until OnDone
};

}  // namespace espalier
