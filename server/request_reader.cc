#include "server/request_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string_view>
#include <utility>

#include "proto/request_limits.h"

namespace espalier {
namespace {

constexpr int kDefaultMaxTokens = 256;
constexpr int kMaxMessages = 1024;
constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxViolations = 16;  // told at once: trailers are bounded (8 KiB by default)

// Collects what is wrong with a message's fields.
class FieldCheck {
 public:
  explicit FieldCheck(const ServedModel& model) : vocabulary_(model.tokenizer->size()) {}

  void Fail(std::string field, std::string description) {
    if (violations_.size() < kMaxViolations) {
      violations_.push_back({std::move(field), std::move(description)});
    }
  }

  // NaN is in no range.
  template <typename T>
  void InRange(std::string_view field, T value, T low, T high) {
    if (!(value >= low && value <= high)) {
      Fail(std::string(field), fmt::format("expected {} to {}, got {}", low, high, value));
    }
  }

  // (0, high]
  void Positive(std::string_view field, float value, float high) {
    if (!(value > 0 && value <= high)) {
      Fail(std::string(field), fmt::format("expected above 0, at most {}, got {}", high, value));
    }
  }

  void AtMost(std::string_view field, size_t count, size_t most) {
    if (count > most) {
      Fail(std::string(field), fmt::format("expected at most {}, got {}", most, count));
    }
  }

  void TokenId(std::string field, int32_t id) {
    if (Known(id)) return;
    Fail(std::move(field), fmt::format("expected a token id below {}, got {}", vocabulary_, id));
  }

  template <typename Ids>
  void TokenIds(std::string_view field, const Ids& ids) {
    const auto unknown = std::ranges::find_if(ids, [this](int32_t id) { return !Known(id); });
    if (unknown == ids.end()) return;
    // One is enough of a list that may be long.
    TokenId(fmt::format("{}[{}]", field, unknown - ids.begin()), *unknown);
  }

  std::optional<RpcError> Error() const {
    if (violations_.empty()) return std::nullopt;
    return BadFields(violations_);
  }

 private:
  bool Known(int32_t id) const { return id >= 0 && id < vocabulary_; }

  const int vocabulary_;
  std::vector<FieldViolation> violations_;
};

std::optional<RpcError> CheckModel(const std::string& asked, const ServedModel& model) {
  if (asked.empty() || asked == model.name) return std::nullopt;
  return UnknownModel(asked, model.name);
}

uint64_t RandomSeed() {
  thread_local std::mt19937_64 random = [] {
    std::random_device device;
    std::seed_seq seeds{device(), device(), device(), device()};
    return std::mt19937_64(seeds);
  }();
  return random();
}

void CheckChat(const v1::ChatPrompt& chat, FieldCheck* check) {
  if (chat.messages().empty()) check->Fail("chat.messages", "expected at least one message");
  check->AtMost("chat.messages", chat.messages_size(), kMaxMessages);
  for (int i = 0; i < chat.messages_size(); ++i) {
    if (chat.messages(i).role().empty()) {
      check->Fail(fmt::format("chat.messages[{}].role", i), "expected a role, got nothing");
    }
  }
}

void ReadSampling(const v1::SamplingParams& wire, FieldCheck* check, SamplingParams* sampling) {
  if (wire.has_temperature()) {
    check->InRange("sampling.temperature", wire.temperature(), 0.0f, kMaxTemperature);
    sampling->temperature = wire.temperature();
  }
  if (wire.has_top_k()) {
    check->InRange("sampling.top_k", wire.top_k(), 0, INT32_MAX);
    sampling->top_k = wire.top_k();
  }
  if (wire.has_top_p()) {
    check->Positive("sampling.top_p", wire.top_p(), 1.0f);
    sampling->top_p = wire.top_p();
  }
  if (wire.has_min_p()) {
    check->InRange("sampling.min_p", wire.min_p(), 0.0f, 1.0f);
    sampling->min_p = wire.min_p();
  }
  if (wire.has_repetition_penalty()) {
    check->Positive("sampling.repetition_penalty", wire.repetition_penalty(),
                    kMaxRepetitionPenalty);
    sampling->repetition_penalty = wire.repetition_penalty();
  }
  if (wire.has_presence_penalty()) {
    check->InRange("sampling.presence_penalty", wire.presence_penalty(), -kMaxPenalty, kMaxPenalty);
    sampling->presence_penalty = wire.presence_penalty();
  }
  if (wire.has_frequency_penalty()) {
    check->InRange("sampling.frequency_penalty", wire.frequency_penalty(), -kMaxPenalty,
                   kMaxPenalty);
    sampling->frequency_penalty = wire.frequency_penalty();
  }
  check->AtMost("sampling.logit_bias", wire.logit_bias_size(), kMaxLogitBiases);
  for (const auto& [token, bias] : wire.logit_bias()) {
    const std::string field = fmt::format("sampling.logit_bias[{}]", token);
    check->TokenId(field, token);
    check->InRange(field, bias, -kMaxLogitBias, kMaxLogitBias);
    sampling->logit_bias.emplace_back(token, bias);
  }
  // A map has no order; the same request shall be the same request.
  std::sort(sampling->logit_bias.begin(), sampling->logit_bias.end());
  sampling->seed = wire.has_seed() ? wire.seed() : RandomSeed();
}

void ReadStop(const v1::StopParams& wire, const ServedModel& model, FieldCheck* check,
              GenerateInput* input) {
  StopParams& stop = input->request.stop;
  if (wire.has_max_tokens()) {
    check->InRange("stop.max_tokens", wire.max_tokens(), 1, INT32_MAX);
    stop.max_tokens = wire.max_tokens();
  }
  check->InRange("stop.min_tokens", wire.min_tokens(), 0,
                 wire.has_max_tokens() ? std::max(wire.max_tokens(), 0) : INT32_MAX);
  stop.min_tokens = wire.min_tokens();
  check->AtMost("stop.stop", wire.stop_size(), kMaxStopStrings);
  for (int i = 0; i < std::min(wire.stop_size(), kMaxStopStrings); ++i) {
    if (wire.stop(i).empty() || wire.stop(i).size() > kMaxStopBytes) {
      check->Fail(fmt::format("stop.stop[{}]", i), fmt::format("expected 1 to {} bytes, got {}",
                                                               kMaxStopBytes, wire.stop(i).size()));
    }
    input->stops.push_back(wire.stop(i));
  }
  check->AtMost("stop.stop_token_ids", wire.stop_token_ids_size(), kMaxStopTokens);
  check->TokenIds("stop.stop_token_ids", wire.stop_token_ids());
  stop.stop_tokens.assign(wire.stop_token_ids().begin(), wire.stop_token_ids().end());
  if (!wire.ignore_eos()) {
    const std::vector<int32_t>& ends = model.tokenizer->vocabulary().end_tokens;
    stop.stop_tokens.insert(stop.stop_tokens.end(), ends.begin(), ends.end());
  }
}

void ReadBounds(const v1::PruneBounds& wire, const ServedModel& model, FieldCheck* check,
                PruneBounds* bounds) {
  bounds->never = wire.never();
  if (wire.has_max_prune_ratio()) {
    check->InRange("prune.max_prune_ratio", wire.max_prune_ratio(), 0.0f, 1.0f);
    bounds->max_prune_ratio = wire.max_prune_ratio();
  }
  if (wire.has_max_quality_loss()) {
    if (!(wire.max_quality_loss() >= 0)) {
      check->Fail("prune.max_quality_loss",
                  fmt::format("expected 0 or more, got {}", wire.max_quality_loss()));
    }
    bounds->max_quality_loss = wire.max_quality_loss();
  }
  if (wire.has_rung()) {
    check->InRange("prune.rung", wire.rung(), 0, model.ladder.size() - 1);
    bounds->rung = wire.rung();
  }
}

template <typename Message>
std::optional<RpcError> EncodeText(const Message& message, const PromptEncoder& encoder,
                                   std::vector<int32_t>* ids) {
  absl::StatusOr<std::vector<int32_t>> encoded =
      encoder.EncodeText(message.text(), message.parse_special());
  if (!encoded.ok()) return BadFields({{"text", std::string(encoded.status().message())}});
  *ids = *std::move(encoded);
  return std::nullopt;
}

std::optional<RpcError> EncodeChat(const v1::ChatPrompt& chat, const PromptEncoder& encoder,
                                   std::vector<int32_t>* ids) {
  std::vector<ChatMessage> messages;
  for (const v1::ChatMessage& message : chat.messages()) {
    messages.push_back({message.role(), message.content()});
  }
  absl::StatusOr<std::vector<int32_t>> encoded = encoder.EncodeChat(messages);
  if (!encoded.ok()) return BadFields({{"chat", std::string(encoded.status().message())}});
  *ids = *std::move(encoded);
  return std::nullopt;
}

// At least one prompt token, and room for `output` more.
std::optional<RpcError> CheckLength(std::string_view field, size_t prompt, int64_t output,
                                    const ServedModel& model) {
  if (prompt == 0)
    return BadFields({{std::string(field), "expected at least one token, got none"}});
  const int64_t limit = model.max_sequence_tokens;
  const auto tokens = static_cast<int64_t>(prompt);
  const int64_t longest = limit - std::min<int64_t>(output, 1);
  if (tokens > longest) {
    return NeverFits(
        {std::string(field), fmt::format("expected at most {} tokens, got {}", longest, tokens)},
        model.max_sequence_tokens);
  }
  if (tokens + output > limit) {
    return NeverFits(
        {"stop.max_tokens", fmt::format("expected at most {} beside {} prompt tokens, got {}",
                                        limit - tokens, tokens, output)},
        model.max_sequence_tokens);
  }
  return std::nullopt;
}

}  // namespace

std::optional<RpcError> ReadGenerate(const v1::GenerateRequest& message, const ServedModel& model,
                                     const PromptEncoder& encoder, GenerateInput* input) {
  using Wire = v1::GenerateRequest;
  if (auto error = CheckModel(message.model(), model)) return error;
  FieldCheck check(model);
  Request& request = input->request;
  check.AtMost("request_id", message.request_id().size(), kMaxRequestIdBytes);
  ReadSampling(message.sampling(), &check, &request.sampling);
  ReadStop(message.stop(), model, &check, input);
  ReadBounds(message.prune(), model, &check, &request.bounds);
  check.InRange("logprobs.top", message.logprobs().top(), 0, kMaxTopLogprobs);
  if (message.logprobs().enabled()) {
    request.sampling.top_logprobs = message.logprobs().top();
  } else if (message.logprobs().top() > 0) {
    check.Fail("logprobs.top", "expected logprobs.enabled with it");
  }
  request.priority = message.priority();

  std::string_view field;
  switch (message.prompt_case()) {
    case Wire::kText:
      field = "text";
      break;
    case Wire::kChat:
      field = "chat";
      CheckChat(message.chat(), &check);
      break;
    case Wire::kTokenIds:
      field = "token_ids.ids";
      check.TokenIds(field, message.token_ids().ids());
      break;
    case Wire::PROMPT_NOT_SET:
      check.Fail("prompt", "expected text, chat or token_ids");
      break;
  }
  if (message.parse_special() && message.prompt_case() != Wire::kText) {
    check.Fail("parse_special", "expected only with text");
  }
  if (auto error = check.Error()) return error;

  std::vector<int32_t>& prompt = request.prompt;
  std::optional<RpcError> error;
  if (message.has_text()) error = EncodeText(message, encoder, &prompt);
  if (message.has_chat()) error = EncodeChat(message.chat(), encoder, &prompt);
  if (error.has_value()) return error;
  if (message.has_token_ids()) {
    prompt.assign(message.token_ids().ids().begin(), message.token_ids().ids().end());
  }
  const bool asked = message.stop().has_max_tokens();
  error = CheckLength(field, prompt.size(), asked ? request.stop.max_tokens : 1, model);
  if (error.has_value()) return error;
  if (!asked) {
    const int room = model.max_sequence_tokens - static_cast<int>(prompt.size());
    request.stop.max_tokens = std::min(std::max(kDefaultMaxTokens, request.stop.min_tokens), room);
    if (request.stop.min_tokens > room) {
      return NeverFits(
          {"stop.min_tokens", fmt::format("expected at most {} beside {} prompt "
                                          "tokens, got {}",
                                          room, prompt.size(), request.stop.min_tokens)},
          model.max_sequence_tokens);
    }
  }
  return std::nullopt;
}

std::optional<RpcError> ReadScore(const v1::ScoreRequest& message, const ServedModel& model,
                                  const PromptEncoder& encoder, Request* request) {
  using Wire = v1::ScoreRequest;
  if (auto error = CheckModel(message.model(), model)) return error;
  FieldCheck check(model);
  check.InRange("top", message.top(), 0, kMaxTopLogprobs);
  ReadBounds(message.prune(), model, &check, &request->bounds);
  if (message.input_case() == Wire::INPUT_NOT_SET)
    check.Fail("input", "expected text or token_ids");
  if (message.has_token_ids()) check.TokenIds("token_ids.ids", message.token_ids().ids());
  if (message.parse_special() && !message.has_text()) {
    check.Fail("parse_special", "expected only with text");
  }
  if (auto error = check.Error()) return error;

  if (message.has_text()) {
    if (auto error = EncodeText(message, encoder, &request->prompt)) return error;
  } else {
    request->prompt.assign(message.token_ids().ids().begin(), message.token_ids().ids().end());
  }
  request->prompt_logprobs = true;
  request->sampling.top_logprobs = message.top();
  request->stop.max_tokens = 0;
  request->priority = message.priority();
  return CheckLength(message.has_text() ? "text" : "token_ids.ids", request->prompt.size(), 0,
                     model);
}

std::optional<RpcError> ReadTokenize(const v1::TokenizeRequest& message, const ServedModel& model,
                                     const PromptEncoder& encoder, std::vector<int32_t>* ids) {
  using Wire = v1::TokenizeRequest;
  if (auto error = CheckModel(message.model(), model)) return error;
  FieldCheck check(model);
  if (message.input_case() == Wire::INPUT_NOT_SET) check.Fail("input", "expected text or chat");
  if (message.has_chat()) CheckChat(message.chat(), &check);
  if (message.parse_special() && !message.has_text()) {
    check.Fail("parse_special", "expected only with text");
  }
  if (auto error = check.Error()) return error;
  if (message.has_chat()) return EncodeChat(message.chat(), encoder, ids);
  return EncodeText(message, encoder, ids);
}

std::optional<RpcError> ReadDetokenize(const v1::DetokenizeRequest& message,
                                       const ServedModel& model, std::vector<int32_t>* ids) {
  if (auto error = CheckModel(message.model(), model)) return error;
  FieldCheck check(model);
  check.TokenIds("token_ids", message.token_ids());
  if (auto error = check.Error()) return error;
  ids->assign(message.token_ids().begin(), message.token_ids().end());
  return std::nullopt;
}

}  // namespace espalier
