#include "server/api_service.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "server/generate_call.h"
#include "server/request_reader.h"
#include "server/score_call.h"
#include "server/wire.h"

namespace espalier {
namespace {

// Answers a short call with what `work` makes of it: an error, or none and a response.
template <typename Request, typename Response, typename Work>
grpc::ServerUnaryReactor* Answer(const Backstage* backstage, grpc::CallbackServerContext* context,
                                 const grpc::ByteBuffer& bytes, grpc::ByteBuffer* answer,
                                 const Work& work) {
  Request request;
  Response response;
  std::optional<RpcError> error;
  if (backstage == nullptr) error = Loading();
  if (!error.has_value()) error = Unpack(bytes, &request);
  if (!error.has_value()) error = work(request, &response);
  if (!error.has_value()) {
    Pack(response, answer);
  } else if (error->retry_after.has_value()) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms",
                                 fmt::format("{}", error->retry_after->count()));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(error.has_value() ? error->status : grpc::Status::OK);
  return reactor;
}

v1::MemoryLedger WireLedger(const Backstage& stage, const Ledger& ledger) {
  v1::MemoryLedger wire;
  wire.set_weights(ledger.weights);
  wire.set_weights_released(ledger.weights_released);
  wire.set_grpc(ledger.grpc);
  wire.set_kv_used(ledger.kv_used);
  wire.set_kv_reusable(ledger.kv_reusable);
  wire.set_kv_free(ledger.kv_free);
  wire.set_workspace(ledger.workspace);
  wire.set_resident(ResidentMemoryBytes());
  wire.set_kv_allowed(ledger.kv_used + ledger.kv_reusable + ledger.kv_free);
  if (stage.memory != nullptr) {
    wire.set_budget(stage.memory->budget());
    wire.set_kv_allowed(stage.memory->kv_bytes());
  }
  return wire;
}

std::optional<RpcError> CheckBudget(const v1::SetMemoryBudgetRequest& asked) {
  if (asked.share() == 0) return std::nullopt;
  if (!(asked.share() >= 0.01 && asked.share() <= 1)) {
    return BadFields({{"share", fmt::format("expected 0, or 0.01 to 1, got {}", asked.share())}});
  }
  if (asked.bytes() > 0) return BadFields({{"share", "expected no bytes beside it"}});
  return std::nullopt;
}

// Paths that may stand in a status: errors name them.
std::optional<RpcError> CheckReload(const v1::ReloadModelRequest& asked) {
  constexpr size_t kLongest = 1024;
  std::vector<FieldViolation> violations;
  const std::pair<const char*, const std::string*> paths[] = {{"model", &asked.model()},
                                                              {"ladder", &asked.ladder()}};
  for (const auto& [field, path] : paths) {
    if (path->size() > kLongest) {
      violations.push_back(
          {field, fmt::format("expected at most {} bytes, got {}", kLongest, path->size())});
    } else if (std::ranges::any_of(*path, [](unsigned char c) { return c < 0x20 || c == 0x7F; })) {
      violations.push_back({field, "expected a path without control characters"});
    }
  }
  if (asked.without_ladder() && !asked.ladder().empty()) {
    violations.push_back({"without_ladder", "expected no ladder beside it"});
  }
  if (violations.empty()) return std::nullopt;
  return BadFields(violations);
}

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* ApiService::Generate(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return GenerateCall::Start(&options_, backstage(), context, *request);
}

grpc::ServerUnaryReactor* ApiService::Score(grpc::CallbackServerContext* context,
                                            const grpc::ByteBuffer* request,
                                            grpc::ByteBuffer* response) {
  return ScoreCall::Start(&options_, backstage(), context, *request, response);
}

grpc::ServerUnaryReactor* ApiService::Tokenize(grpc::CallbackServerContext* context,
                                               const grpc::ByteBuffer* request,
                                               grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  return Answer<v1::TokenizeRequest, v1::TokenizeResponse>(
      stage, context, *request, response,
      [stage](const v1::TokenizeRequest& asked,
              v1::TokenizeResponse* answer) -> std::optional<RpcError> {
        std::vector<int32_t> ids;
        const std::shared_ptr<const ServedModel> model = stage->model();
        if (auto error = ReadTokenize(asked, *model, *stage->encoder, &ids)) return error;
        for (const int32_t id : ids) {
          answer->add_token_ids(id);
          answer->add_pieces(std::string(model->tokenizer->TokenBytes(id)));
        }
        return std::nullopt;
      });
}

grpc::ServerUnaryReactor* ApiService::Detokenize(grpc::CallbackServerContext* context,
                                                 const grpc::ByteBuffer* request,
                                                 grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  return Answer<v1::DetokenizeRequest, v1::DetokenizeResponse>(
      stage, context, *request, response,
      [stage](const v1::DetokenizeRequest& asked,
              v1::DetokenizeResponse* answer) -> std::optional<RpcError> {
        std::vector<int32_t> ids;
        const std::shared_ptr<const ServedModel> model = stage->model();
        if (auto error = ReadDetokenize(asked, *model, &ids)) return error;
        answer->set_text(model->tokenizer->Decode(ids, asked.skip_special()));
        return std::nullopt;
      });
}

grpc::ServerUnaryReactor* ApiService::GetModel(grpc::CallbackServerContext* context,
                                               const grpc::ByteBuffer* request,
                                               grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  return Answer<v1::GetModelRequest, v1::GetModelResponse>(
      stage, context, *request, response,
      [&](const v1::GetModelRequest&, v1::GetModelResponse* answer) -> std::optional<RpcError> {
        const std::shared_ptr<const ServedModel> served = stage->model();
        const ServedModel& model = *served;
        answer->set_name(model.name);
        answer->set_architecture(std::string(ArchitectureName(model.config.architecture)));
        answer->set_layers(model.config.layers);
        answer->set_hidden_size(model.config.hidden);
        answer->set_attention_heads(model.config.heads);
        answer->set_kv_heads(model.config.kv_heads);
        answer->set_vocabulary_size(model.config.vocabulary);
        answer->set_max_sequence_tokens(model.max_sequence_tokens);
        answer->set_weight_type(model.weight_type);
        answer->set_kv_type(model.kv_type);
        const std::vector<int32_t>& ends = model.tokenizer->vocabulary().end_tokens;
        answer->mutable_end_token_ids()->Add(ends.begin(), ends.end());
        answer->set_has_chat_template(model.chat_template != nullptr);
        answer->set_device(model.device);
        answer->set_server_version(server_version_);
        for (int i = 0; i < model.ladder.size(); ++i) {
          const Rung& rung = model.ladder.rung(i);
          v1::RungInfo* info = answer->add_rungs();
          info->set_prune_ratio(static_cast<float>(rung.decode.prune_ratio()));
          info->set_expected_loss(static_cast<float>(rung.price.quality_loss_nats));
          info->set_prefill_us_per_token(static_cast<float>(rung.price.prefill_us_per_token));
          info->set_decode_us_per_row(static_cast<float>(rung.price.decode_us_per_row));
          info->set_kv_bytes_per_token(static_cast<float>(rung.price.kv_bytes_per_token));
          info->set_int4_kv(rung.int4_kv);
        }
        return std::nullopt;
      });
}

grpc::ServerUnaryReactor* ApiService::GetLoad(grpc::CallbackServerContext* context,
                                              const grpc::ByteBuffer* request,
                                              grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  return Answer<v1::GetLoadRequest, v1::GetLoadResponse>(
      stage, context, *request, response,
      [&](const v1::GetLoadRequest&, v1::GetLoadResponse* answer) -> std::optional<RpcError> {
        const LoadSnapshot load = stage->engine->load();
        answer->set_running_requests(load.stats.running);
        answer->set_waiting_requests(load.waiting());
        answer->set_max_waiting_requests(load.max_waiting);
        answer->set_kv_utilization(load.kv_utilization());
        *answer->mutable_memory() = WireLedger(*stage, load.ledger);
        answer->mutable_memory()->set_foreign(foreign_bytes_ ? foreign_bytes_() : 0);
        answer->set_generated_tokens_per_second(load.generated_tokens_per_second);
        answer->set_draining(load.draining);
        return std::nullopt;
      });
}

grpc::ServerUnaryReactor* ApiService::GetDecisions(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  return Answer<v1::GetDecisionsRequest, v1::GetDecisionsResponse>(
      stage, context, *request, response,
      [&](const v1::GetDecisionsRequest& asked,
          v1::GetDecisionsResponse* answer) -> std::optional<RpcError> {
        if (asked.last() < 0) {
          return BadFields(
              {{"last", fmt::format("expected 0 or more lines, got {}", asked.last())}});
        }
        const std::shared_ptr<const ServedModel> model = stage->model();
        if (model->decisions == nullptr) return DecidesNothing(model->policy);
        const auto most = static_cast<size_t>(asked.last());
        answer->set_log(model->decisions->Recent(most > 0 ? most : SIZE_MAX));
        return std::nullopt;
      });
}

grpc::ServerUnaryReactor* ApiService::SetMemoryBudget(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  return Answer<v1::SetMemoryBudgetRequest, v1::SetMemoryBudgetResponse>(
      stage, context, *request, response,
      [&](const v1::SetMemoryBudgetRequest& asked,
          v1::SetMemoryBudgetResponse* answer) -> std::optional<RpcError> {
        if (!options_.admin || stage->memory == nullptr) return NotAdmin();
        if (auto error = CheckBudget(asked); error.has_value()) return error;
        stage->memory->SetBudget(asked.bytes(), asked.share());
        *answer->mutable_memory() = WireLedger(*stage, stage->engine->load().ledger);
        return std::nullopt;
      });
}

grpc::ServerUnaryReactor* ApiService::ReloadModel(grpc::CallbackServerContext* context,
                                                  const grpc::ByteBuffer* request,
                                                  grpc::ByteBuffer* response) {
  const Backstage* stage = backstage();
  v1::ReloadModelRequest asked;
  std::optional<RpcError> error;
  if (stage == nullptr) error = Loading();
  if (!error.has_value()) error = Unpack(*request, &asked);
  if (!error.has_value() && (!options_.admin || !stage->reload)) error = NotAdmin();
  if (!error.has_value()) error = CheckReload(asked);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const auto finish = [context, reactor, response](const Reloaded& reloaded,
                                                   const std::optional<RpcError>& refused) {
    if (refused.has_value()) {
      if (refused->retry_after.has_value()) {
        context->AddTrailingMetadata("grpc-retry-pushback-ms",
                                     fmt::format("{}", refused->retry_after->count()));
      }
      reactor->Finish(refused->status);
      return;
    }
    v1::ReloadModelResponse answer;
    answer.set_name(reloaded.model->name);
    answer.set_weight_type(reloaded.model->weight_type);
    answer.set_rungs(reloaded.model->ladder.size());
    answer.set_requests_before(reloaded.before);
    *answer.mutable_loading() = WireDuration(reloaded.loading_s);
    Pack(answer, response);
    reactor->Finish(grpc::Status::OK);
  };
  if (error.has_value()) {
    finish({}, error);
  } else {
    stage->reload({.model = asked.model(),
                   .ladder = asked.ladder(),
                   .without_ladder = asked.without_ladder()},
                  finish);
  }
  return reactor;
}

}  // namespace espalier
