// One Generate call: tokens from its stream, text and messages out, one Finish.
//
// The write loop runs on whichever thread brings news (writer, gRPC's), one at a time behind the
// gate, and stays inside while a write is in flight. Whoever is inside when the end is known
// finishes the call and never leaves, so Finish happens exactly once.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <mutex>
#include <optional>

#include "engine/model/text/tokenizer.h"
#include "server/call.h"
#include "server/stop_matcher.h"

namespace espalier {

class GenerateCall final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                           public StreamReader,
                           public std::enable_shared_from_this<GenerateCall> {
 public:
  // Begins the call; gRPC owns the result until OnDone.
  static GenerateCall* Start(const CallOptions* options, const Backstage* backstage,
                             grpc::CallbackServerContext* context, const grpc::ByteBuffer& request);

  GenerateCall(const CallOptions* options, const Backstage* backstage,
               grpc::CallbackServerContext* context)
      : call_(options, backstage, context, "Generate"),
        context_(context),
        buffer_tokens_(options->stream_buffer_tokens),
        stall_grace_(options->stall_grace) {}

  void OnReady() override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  // The text side of a call, made once the request is known to be good.
  struct Text {
    StreamingDetokenizer detokenizer;
    StopMatcher stops;
    int min_tokens;
  };

  std::optional<RpcError> Begin(const grpc::ByteBuffer& bytes);
  void Pump();
  // Inside the gate, no write in flight: writes or finishes if there is cause, else leaves.
  void Advance();
  // Fills message_ with what waits; sets end_ if that is all.
  void Compose();
  void AddToken(const TokenResult& token);
  void EndMessage(FinishReason reason);
  void CutOff();

  struct End {
    grpc::Status status;
    bool with_message;
  };

  Call call_;
  grpc::CallbackServerContext* const context_;
  const size_t buffer_tokens_;
  const std::chrono::milliseconds stall_grace_;
  std::optional<Text> text_;
  bool logprobs_ = false;
  uint64_t seed_ = 0;
  bool told_id_ = false;
  v1::GenerateResponse message_;
  grpc::ByteBuffer wire_;  // the one in flight
  std::optional<End> end_;

  std::shared_ptr<GenerateCall> self_;  // until OnDone
  std::mutex mutex_;                    // guards what follows
  bool done_ = false;
  bool cutting_off_ = false;
  grpc::Alarm cut_off_;
};

}  // namespace espalier
