// From a message on the wire to the engine's Request: every field checked, every fault named.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine/scheduling/request.h"
#include "espalier/v1/espalier.pb.h"
#include "server/prompt_encoder.h"
#include "server/rpc_error.h"
#include "server/served_model.h"

namespace espalier {

// A Generate request, checked and tokenised.
struct GenerateInput {
  Request request;                 // without id, arrival, deadline
  std::vector<std::string> stops;  // stop strings
};

// Each returns the error, or none and fills its output. The work is bounded by the message's size.
std::optional<RpcError> ReadGenerate(const v1::GenerateRequest& message, const ServedModel& model,
                                     const PromptEncoder& encoder, GenerateInput* input);
std::optional<RpcError> ReadScore(const v1::ScoreRequest& message, const ServedModel& model,
                                  const PromptEncoder& encoder, Request* request);
std::optional<RpcError> ReadTokenize(const v1::TokenizeRequest& message, const ServedModel& model,
                                     const PromptEncoder& encoder, std::vector<int32_t>* ids);
std::optional<RpcError> ReadDetokenize(const v1::DetokenizeRequest& message,
                                       const ServedModel& model, std::vector<int32_t>* ids);

}  // namespace espalier
