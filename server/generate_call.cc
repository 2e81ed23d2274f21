#include "server/generate_call.h"

#include <fmt/format.h>

#include <chrono>
#include <utility>

#include "server/request_reader.h"
#include "server/wire.h"

namespace espalier {
GenerateCall* GenerateCall::Start(const CallOptions* options, const Backstage* backstage,
                                  grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer& request) {
  auto call = std::make_shared<GenerateCall>(options, backstage, context);
  call->self_ = call;
  if (std::optional<RpcError> error = call->Begin(request)) {
    call->call_.gate.Enter();  // nothing was submitted: nobody else is there
    call->Finish(call->call_.End(*error));
  }
  return call.get();
}

std::optional<RpcError> GenerateCall::Begin(const grpc::ByteBuffer& bytes) {
  RequestSummary& summary = call_.summary;
  v1::GenerateRequest message;
  if (auto error = Unpack(bytes, &message)) return error;
  summary.request_id = message.request_id().empty() ? fmt::format("espalier-{:x}", summary.id)
                                                    : message.request_id().substr(0, 128);
  if (auto error = call_.Admit(message.priority())) return error;
  GenerateInput input;
  if (auto error = ReadGenerate(message, call_.model(), call_.encoder(), &input)) return error;
  Request& request = input.request;
  if (call_.log_prompts()) {
    summary.prompt = call_.model().tokenizer->Decode(request.prompt, /*skip_special=*/false);
  }
  logprobs_ = request.sampling.top_logprobs >= 0;
  seed_ = request.sampling.seed;
  text_.emplace(Text{StreamingDetokenizer(*call_.model().tokenizer, /*skip_special=*/true),
                     StopMatcher(std::move(input.stops)), request.stop.min_tokens});
  return call_.Submit(std::move(request), buffer_tokens_, weak_from_this());
}

void GenerateCall::OnReady() {
  if (call_.stream()->stalled()) {
    std::lock_guard lock(mutex_);
    if (!done_ && !std::exchange(cutting_off_, true)) {
      cut_off_.Set(std::chrono::system_clock::now() + stall_grace_,
                   [weak = weak_from_this()](bool due) {
                     if (const auto self = weak.lock(); due && self != nullptr) self->CutOff();
                   });
    }
  }
  Pump();
}

void GenerateCall::CutOff() {
  std::lock_guard lock(mutex_);
  if (!done_) context_->TryCancel();
}

void GenerateCall::OnCancel() {
  call_.Cancel();
  Pump();
}

void GenerateCall::OnWriteDone(bool ok) {
  if (ok) {
    call_.NoteWritten();
  } else {
    call_.Cancel();
  }
  Advance();
}

void GenerateCall::OnDone() {
  {
    std::lock_guard lock(mutex_);
    done_ = true;
  }
  call_.Leave();
  // A writer thread may still hold another reference, and finds the gate closed.
  const std::shared_ptr<GenerateCall> last = std::move(self_);
}

void GenerateCall::Pump() {
  if (call_.gate.Enter()) Advance();
}

void GenerateCall::Advance() {
  do {
    if (call_.cancelled()) {
      Finish(call_.End(call_.Gone()));
      return;
    }
    Compose();
    if (end_.has_value()) {
      if (end_->with_message) {
        Pack(message_, &wire_);
        StartWriteAndFinish(&wire_, grpc::WriteOptions(), end_->status);
      } else {
        Finish(end_->status);
      }
      return;
    }
    if (message_.token_ids_size() > 0) {
      Pack(message_, &wire_);
      StartWrite(&wire_);
      return;
    }
  } while (!call_.gate.Leave());
}

void GenerateCall::Compose() {
  message_.Clear();
  TokenStream::Pending& pending = call_.pending;
  call_.stream()->Drain(&pending);
  for (const TokenResult& token : pending.tokens) {
    AddToken(token);
    if (!text_->stops.matched().empty()) break;
  }
  call_.Note(pending.progress);
  if (!text_->stops.matched().empty()) {
    if (!pending.end.has_value()) call_.StopEngine();
    EndMessage(FinishReason::kStop);
  } else if (pending.end.has_value()) {
    if (const std::optional<RpcError> error = call_.ErrorOf(*pending.end)) {
      end_ = End{call_.End(*error), message_.token_ids_size() > 0};
    } else {
      const bool may_stop = call_.summary.output_tokens >= text_->min_tokens;
      *message_.mutable_text() += text_->stops.Push(text_->detokenizer.Flush(), may_stop);
      *message_.mutable_text() += text_->stops.Flush();
      EndMessage(pending.end->reason);
    }
  }
  if (!told_id_ && (message_.token_ids_size() > 0 || end_.has_value())) {
    message_.set_request_id(call_.summary.request_id);
    told_id_ = true;
  }
}

void GenerateCall::AddToken(const TokenResult& token) {
  ++call_.summary.output_tokens;
  message_.add_token_ids(token.token);
  *message_.mutable_text() += text_->stops.Push(text_->detokenizer.Push(token.token),
                                                call_.summary.output_tokens >= text_->min_tokens);
  if (!logprobs_) return;
  v1::TokenLogprob* logprob = message_.add_logprobs();
  logprob->set_token_id(token.token);
  logprob->set_logprob(token.logprob);
  for (const auto& [candidate, candidate_logprob] : token.top) {
    v1::TokenCandidate* top = logprob->add_top();
    top->set_token_id(candidate);
    top->set_logprob(candidate_logprob);
  }
}

void GenerateCall::EndMessage(FinishReason reason) {
  v1::Finished* finished = message_.mutable_finished();
  const bool stop = reason == FinishReason::kStop;
  finished->set_reason(stop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH);
  finished->set_stop(std::string(text_->stops.matched()));
  *finished->mutable_usage() = call_.WireUsage();
  *finished->mutable_times() = call_.WireTimes();
  *finished->mutable_served() = call_.WireServed(call_.summary.output_tokens);
  finished->set_seed(seed_);
  end_ = End{call_.EndWell(reason), /*with_message=*/true};
}

}  // namespace espalier
