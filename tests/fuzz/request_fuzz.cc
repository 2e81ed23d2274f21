// Fuzzes the checks of requests. The input is a message in protobuf's text form, tried as each kind
// of request; what parses goes over the wire once, so that only what a client could send is judged.
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/model/files/model_file.h"
#include "espalier/v1/espalier.pb.h"
#include "server/request_reader.h"
#include "tests/fuzz/fuzz_check.h"

namespace espalier {
namespace {

constexpr int kMaxSequenceTokens = 64;

class Silence final : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int, google::protobuf::io::ColumnNumber, const std::string&) override {}
};

template <typename Message>
std::optional<Message> Parse(const std::string& text) {
  static Silence silence;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&silence);
  parser.SetRecursionLimit(16);
  Message message;
  Message received;
  if (!parser.ParseFromString(text, &message) ||
      !received.ParseFromString(message.SerializeAsString())) {
    return {};
  }
  return received;
}

// gRPC sends at most 8 KiB of trailers by default, and these travel in them as base64.
void RequireTellable(const RpcError& error) {
  Require(!error.status.ok(), "an error is no success");
  Require(error.status.error_message().find('\n') == std::string::npos, "an error is one line");
  Require(error.status.error_message().size() + error.status.error_details().size() * 4 / 3 < 8000,
          "an error fits the trailers");
}

struct Checked {
  ServedModel model;
  std::unique_ptr<PromptEncoder> encoder;

  Checked() {
    const auto file = ModelFile::Open(ESPALIER_TINY_MODEL);
    Require(file.ok(), "the tiny model opens");
    const Vocabulary& vocabulary = (*file)->vocabulary();
    model = {.name = "tiny", .config = (*file)->config()};
    model.tokenizer = *Tokenizer::Create(vocabulary);
    model.chat_template = *ChatTemplate::Compile(vocabulary.chat_template, "<s>", "</s>");
    model.max_sequence_tokens = kMaxSequenceTokens;
    encoder = std::make_unique<PromptEncoder>(model.tokenizer.get(), model.chat_template.get());
  }

  void RequireTokens(std::span<const int32_t> ids) const {
    Require(std::ranges::all_of(
                ids, [&](int32_t id) { return id >= 0 && id < model.tokenizer->size(); }),
            "ids are tokens");
  }

  void RequireRunnable(const Request& request) const {
    const SamplingParams& sampling = request.sampling;
    const StopParams& stop = request.stop;
    Require(!request.prompt.empty(), "there is a prompt");
    RequireTokens(request.prompt);
    RequireTokens(stop.stop_tokens);
    Require(request.prompt.size() + stop.max_tokens <= kMaxSequenceTokens, "the request fits");
    Require(stop.min_tokens >= 0 && stop.min_tokens <= stop.max_tokens, "the bounds are in order");
    Require(sampling.temperature >= 0 && std::isfinite(sampling.temperature), "temperature");
    Require(sampling.top_k >= 0 && sampling.top_p > 0 && sampling.top_p <= 1, "top_k, top_p");
    Require(sampling.min_p >= 0 && sampling.min_p <= 1, "min_p");
    Require(sampling.repetition_penalty > 0 && std::isfinite(sampling.repetition_penalty),
            "repetition_penalty");
    for (const auto& [token, bias] : sampling.logit_bias) {
      RequireTokens(std::span(&token, 1));
      Require(std::isfinite(bias), "a bias is a number");
    }
  }
};

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  static const Checked checked;
  const auto& [model, encoder] = checked;
  const std::string text(reinterpret_cast<const char*>(data), size);
  if (const auto message = Parse<v1::GenerateRequest>(text)) {
    GenerateInput input;
    const auto error = ReadGenerate(*message, model, *encoder, &input);
    error ? RequireTellable(*error) : checked.RequireRunnable(input.request);
  }
  if (const auto message = Parse<v1::ScoreRequest>(text)) {
    Request request;
    const auto error = ReadScore(*message, model, *encoder, &request);
    error ? RequireTellable(*error) : checked.RequireRunnable(request);
  }
  if (const auto message = Parse<v1::TokenizeRequest>(text)) {
    std::vector<int32_t> ids;
    const auto error = ReadTokenize(*message, model, *encoder, &ids);
    error ? RequireTellable(*error) : checked.RequireTokens(ids);
  }
  if (const auto message = Parse<v1::DetokenizeRequest>(text)) {
    std::vector<int32_t> ids;
    const auto error = ReadDetokenize(*message, model, &ids);
    error ? RequireTellable(*error) : checked.RequireTokens(ids);
  }
  return 0;
}
