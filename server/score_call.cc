#include "server/score_call.h"

#include <fmt/format.h>

#include <utility>

#include "server/request_reader.h"
#include "server/wire.h"

namespace espalier {

ScoreCall* ScoreCall::Start(const CallOptions* options, const Backstage* backstage,
                            grpc::CallbackServerContext* context, const grpc::ByteBuffer& request,
                            grpc::ByteBuffer* response) {
  auto call = std::make_shared<ScoreCall>(options, backstage, context, response);
  call->self_ = call;
  if (std::optional<RpcError> error = call->Begin(request)) {
    call->call_.gate.Enter();
    call->Finish(call->call_.End(*error));
  }
  return call.get();
}

std::optional<RpcError> ScoreCall::Begin(const grpc::ByteBuffer& bytes) {
  call_.summary.request_id = fmt::format("espalier-{:x}", call_.summary.id);
  v1::ScoreRequest message;
  if (auto error = Unpack(bytes, &message)) return error;
  if (auto error = call_.Admit(message.priority())) return error;
  Request request;
  if (auto error = ReadScore(message, call_.model(), call_.encoder(), &request)) return error;
  if (call_.log_prompts()) {
    call_.summary.prompt = call_.model().tokenizer->Decode(request.prompt, /*skip_special=*/false);
  }
  response_.mutable_token_ids()->Add(request.prompt.begin(), request.prompt.end());
  // The stream may be as long as the prompt: nobody has to read until the end.
  return call_.Submit(std::move(request), TokenStream::kUnbounded, weak_from_this());
}

void ScoreCall::OnCancel() {
  call_.Cancel();
  Pump();
}

void ScoreCall::OnDone() {
  call_.Leave();
  const std::shared_ptr<ScoreCall> last = std::move(self_);
}

void ScoreCall::Pump() {
  if (!call_.gate.Enter()) return;
  do {
    if (call_.cancelled()) {
      Finish(call_.End(call_.Gone()));
      return;
    }
    TokenStream::Pending& pending = call_.pending;
    call_.stream()->Drain(&pending);
    for (const TokenResult& score : pending.prompt_scores) {
      v1::TokenLogprob* logprob = response_.add_logprobs();
      logprob->set_token_id(score.token);
      logprob->set_logprob(score.logprob);
      response_.set_total_logprob(response_.total_logprob() + score.logprob);
      for (const auto& [candidate, candidate_logprob] : score.top) {
        v1::TokenCandidate* top = logprob->add_top();
        top->set_token_id(candidate);
        top->set_logprob(candidate_logprob);
      }
    }
    if (!pending.end.has_value()) continue;
    call_.Note(pending.progress);
    if (const std::optional<RpcError> error = call_.ErrorOf(*pending.end)) {
      Finish(call_.End(*error));
      return;
    }
    *response_.mutable_usage() = call_.WireUsage();
    *response_.mutable_served() = call_.WireServed(0);
    Pack(response_, wire_);
    Finish(call_.EndWell(pending.end->reason));
    return;
  } while (!call_.gate.Leave());
}

}  // namespace espalier
