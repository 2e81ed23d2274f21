#include "server/api_service.h"

#include <fmt/format.h>

#include <optional>
#include <string_view>

#include "server/generate_call.h"
#include "server/request_reader.h"
#include "server/score_call.h"

namespace espalier {
namespace {

// Ends a short call, well if `error` is none.
grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context,
                                 const std::optional<RpcError>& error = std::nullopt) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  if (error.has_value() && error->retry_after.has_value()) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms",
                                 fmt::format("{}", error->retry_after->count()));
  }
  reactor->Finish(error.has_value() ? error->status : grpc::Status::OK);
  return reactor;
}

std::string_view ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return "llama";
  }
  return "unknown";
}

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* ApiService::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  return GenerateCall::Start(&options_, backstage(), context, *request);
}

grpc::ServerUnaryReactor* ApiService::Score(grpc::CallbackServerContext* context,
                                            const v1::ScoreRequest* request,
                                            v1::ScoreResponse* response) {
  return ScoreCall::Start(&options_, backstage(), context, *request, response);
}

grpc::ServerUnaryReactor* ApiService::Tokenize(grpc::CallbackServerContext* context,
                                               const v1::TokenizeRequest* request,
                                               v1::TokenizeResponse* response) {
  const Backstage* stage = backstage();
  if (stage == nullptr) return Answer(context, Loading());
  std::vector<int32_t> ids;
  if (auto error = ReadTokenize(*request, *stage->model, *stage->encoder, &ids)) {
    return Answer(context, error);
  }
  for (const int32_t id : ids) {
    response->add_token_ids(id);
    response->add_pieces(std::string(stage->model->tokenizer->TokenBytes(id)));
  }
  return Answer(context);
}

grpc::ServerUnaryReactor* ApiService::Detokenize(grpc::CallbackServerContext* context,
                                                 const v1::DetokenizeRequest* request,
                                                 v1::DetokenizeResponse* response) {
  const Backstage* stage = backstage();
  if (stage == nullptr) return Answer(context, Loading());
  std::vector<int32_t> ids;
  if (auto error = ReadDetokenize(*request, *stage->model, &ids)) return Answer(context, error);
  response->set_text(stage->model->tokenizer->Decode(ids, request->skip_special()));
  return Answer(context);
}

grpc::ServerUnaryReactor* ApiService::GetModel(grpc::CallbackServerContext* context,
                                               const v1::GetModelRequest* /*request*/,
                                               v1::GetModelResponse* response) {
  const Backstage* stage = backstage();
  if (stage == nullptr) return Answer(context, Loading());
  const ServedModel& model = *stage->model;
  response->set_name(model.name);
  response->set_architecture(std::string(ArchitectureName(model.config.architecture)));
  response->set_layers(model.config.layers);
  response->set_hidden_size(model.config.hidden);
  response->set_attention_heads(model.config.heads);
  response->set_kv_heads(model.config.kv_heads);
  response->set_vocabulary_size(model.config.vocabulary);
  response->set_max_sequence_tokens(model.max_sequence_tokens);
  response->set_weight_type(model.weight_type);
  response->set_kv_type(model.kv_type);
  const std::vector<int32_t>& ends = model.tokenizer->vocabulary().end_tokens;
  response->mutable_end_token_ids()->Add(ends.begin(), ends.end());
  response->set_has_chat_template(model.chat_template != nullptr);
  response->set_device(model.device);
  response->set_server_version(server_version_);
  return Answer(context);
}

grpc::ServerUnaryReactor* ApiService::GetLoad(grpc::CallbackServerContext* context,
                                              const v1::GetLoadRequest* /*request*/,
                                              v1::GetLoadResponse* response) {
  const Backstage* stage = backstage();
  if (stage == nullptr) return Answer(context, Loading());
  const LoadSnapshot load = stage->engine->load();
  response->set_running_requests(load.stats.running);
  response->set_waiting_requests(load.waiting());
  response->set_max_waiting_requests(load.max_waiting);
  response->set_kv_utilization(load.kv_utilization());
  v1::MemoryLedger* memory = response->mutable_memory();
  memory->set_weights(load.ledger.weights);
  memory->set_kv_used(load.ledger.kv_used);
  memory->set_kv_reusable(load.ledger.kv_reusable);
  memory->set_kv_free(load.ledger.kv_free);
  memory->set_workspace(load.ledger.workspace);
  memory->set_foreign(foreign_bytes_ ? foreign_bytes_() : 0);
  response->set_generated_tokens_per_second(load.generated_tokens_per_second);
  response->set_draining(load.draining);
  return Answer(context);
}

}  // namespace espalier
