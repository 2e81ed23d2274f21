// What every streamed call goes through: a place in the queue, submission, cancellation, one end.
#pragma once

#include <grpcpp/server_context.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "espalier/v1/espalier.pb.h"
#include "server/engine_thread.h"
#include "server/memory_keeper.h"
#include "server/prompt_encoder.h"
#include "server/request_summary.h"
#include "server/rpc_error.h"
#include "server/serial_gate.h"
#include "server/served_model.h"
#include "server/token_stream.h"

namespace espalier {

google::protobuf::Duration WireDuration(double seconds);

// The streamed calls that gRPC still has: a drained engine is done before the last of them is read.
class CallCount {
 public:
  void Add(int calls);
  // A message of some call was taken from us.
  void NoteWritten() { written_.fetch_add(1, std::memory_order_relaxed); }
  // False if some are left at `until`, or nobody read from any of them for `patience`.
  bool WaitForNone(Instant until, Instant patience);

 private:
  std::mutex mutex_;
  std::condition_variable none_;
  int calls_ = 0;
  std::atomic<uint64_t> written_{0};
};

struct CallOptions {
  size_t stream_buffer_tokens = 1024;
  // A stalled reader that reads again is told why its stream ended. One that does not is reset
  // after this, or its call would stay for ever behind the message that flow control holds back.
  std::chrono::milliseconds stall_grace{10'000};
  bool log_prompts = false;
  bool admin = false;  // SetMemoryBudget and ReloadModel are served
  // Told of every call that ended, on a gRPC or writer thread.
  std::function<void(const RequestSummary&)> on_finished;
  std::shared_ptr<CallCount> count = std::make_shared<CallCount>();
};

// What ReloadModel asks for.
struct ReloadOrder {
  std::string model;   // path; empty: as served
  std::string ladder;  // path; empty: as served
  bool without_ladder = false;
};

struct Reloaded {
  std::shared_ptr<const ServedModel> model;
  double loading_s = 0;
  int before = 0;  // requests that finish on the weights before
};

// What a loaded server serves with; everything outlives the calls.
struct Backstage {
  const ServedModels* models = nullptr;
  const PromptEncoder* encoder = nullptr;
  EngineThread* engine = nullptr;
  MemoryKeeper* memory = nullptr;  // null: nobody keeps it
  // Begins a reload and returns; `done` is called once, on a thread of its own or at once. Empty:
  // there is nothing to reload.
  using ReloadDone = std::function<void(const Reloaded&, const std::optional<RpcError>&)>;
  std::function<void(ReloadOrder, ReloadDone)> reload;

  // What is served now.
  std::shared_ptr<const ServedModel> model() const {
    return models->of(engine->inbox().generation());
  }
};

// The state that a Generate and a Score call share. Its reactor guards it with `gate`, except where
// said.
class Call {
 public:
  // `backstage` is null while the model is being loaded.
  Call(const CallOptions* options, const Backstage* backstage, grpc::CallbackServerContext* context,
       std::string_view method);

  // Takes a place in the queue, before any work. To be called first.
  std::optional<RpcError> Admit(int priority);

  // Hands the request, with id, arrival and deadline filled in, to the engine thread.
  std::optional<RpcError> Submit(Request request, size_t stream_capacity,
                                 std::weak_ptr<StreamReader> reader);

  // The caller went away, or wants no more. Outside the gate too.
  void Cancel();
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }
  // Why a cancelled call is: gRPC cancels those past their deadline, we those that do not read.
  RpcError Gone() const;
  // Ends the engine's work without the caller having left.
  void StopEngine() { backstage_->engine->inbox().Cancel(summary.id); }

  // What a stream's end means to the caller; none if it is a good one.
  std::optional<RpcError> ErrorOf(const StreamEnd& end) const;

  // Puts times and counts that the stream told into the summary.
  void Note(const StreamProgress& progress);

  // Each writes the summary and returns the status to finish with. Call one of them, once.
  grpc::Status End(const RpcError& error);
  grpc::Status EndWell(FinishReason reason);

  // The reader took a message.
  void NoteWritten() { options_->count->NoteWritten(); }
  // gRPC is done with the call. Once, from OnDone.
  void Leave() { options_->count->Add(-1); }

  v1::Times WireTimes() const;
  v1::Served WireServed(int tokens) const;
  v1::Usage WireUsage() const;

  // Of the generation that its place is of: after Admit.
  const ServedModel& model() const { return *model_; }
  const PromptEncoder& encoder() const { return *backstage_->encoder; }
  TokenStream* stream() const { return stream_.get(); }
  bool log_prompts() const { return options_->log_prompts; }

  SerialGate gate;
  RequestSummary summary;
  TokenStream::Pending pending;

 private:
  RpcError Stalled() const;
  // Why the inbox takes nothing any more.
  RpcError Closed() const;
  void Report();

  const CallOptions* const options_;
  const Backstage* const backstage_;
  grpc::CallbackServerContext* const context_;
  const Instant arrival_;
  std::optional<Reservation> place_;
  std::shared_ptr<const ServedModel> model_;
  std::shared_ptr<TokenStream> stream_;
  std::atomic<bool> cancelled_{false};
  bool by_policy_ = false;  // the rung, not by the request
};

}  // namespace espalier
