// `espalier tokenize`: the tokens of a text, from a server or from a model file.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/model/chat/chat_template.h"
#include "engine/model/text/tokenizer.h"
#include "tools/command.h"
#include "tools/local_model.h"
#include "tools/remote.h"
#include "tools/text_input.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  std::string model;
  TextInput input;
  bool chat = false;
  std::string system;
  bool special = false;
  bool ids = false;
  bool json = false;
};

struct Tokens {
  std::vector<int32_t> ids;
  std::vector<std::string> pieces;  // bytes of each
};

std::vector<ChatMessage> MessagesOf(const Options& options, const std::string& text) {
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({.role = "system", .content = options.system});
  messages.push_back({.role = "user", .content = text});
  return messages;
}

absl::StatusOr<Tokens> FromServer(const Options& options, const std::string& text) {
  v1::TokenizeRequest request;
  request.set_model(options.remote.model_name);
  request.set_parse_special(options.special);
  if (options.chat) {
    for (const ChatMessage& message : MessagesOf(options, text)) {
      v1::ChatMessage& sent = *request.mutable_chat()->add_messages();
      sent.set_role(message.role);
      sent.set_content(message.content);
    }
  } else {
    request.set_text(text);
  }
  v1::TokenizeResponse response;
  const absl::Status status =
      UnaryCall(options.remote, &v1::EspalierService::Stub::Tokenize, request, &response);
  if (!status.ok()) return status;
  return Tokens{{response.token_ids().begin(), response.token_ids().end()},
                {response.pieces().begin(), response.pieces().end()}};
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const Options& options, const Tokenizer& tokenizer,
                                                const std::string& text) {
  const Vocabulary& vocabulary = tokenizer.vocabulary();
  if (vocabulary.chat_template.empty()) {
    return absl::FailedPreconditionError(
        fmt::format("{}: the model has no chat template", options.model));
  }
  auto compiled =
      ChatTemplate::Compile(vocabulary.chat_template, tokenizer.TokenBytes(vocabulary.bos),
                            tokenizer.TokenBytes(vocabulary.eos));
  if (!compiled.ok()) return compiled.status();
  auto segments = (*compiled)->RenderSegments(MessagesOf(options, text), true);
  if (!segments.ok()) return segments.status();
  std::string prompt;
  for (const ChatSegment& segment : *segments) {
    // Merges may cross from template into message, so the whole is encoded at once; that would
    // also turn a special token's string inside a message into the token.
    if (segment.from_caller) {
      auto parsed = tokenizer.Encode(segment.text, Tokenizer::Special::kParse);
      if (!parsed.ok()) return parsed.status();
      for (const int32_t id : *parsed) {
        if (tokenizer.IsSpecial(id)) {
          return absl::InvalidArgumentError(fmt::format(
              "the message holds the special token {}: only a server tokenizes that as text",
              tokenizer.TokenBytes(id)));
        }
      }
    }
    prompt += segment.text;
  }
  return tokenizer.Encode(prompt, Tokenizer::Special::kParse);
}

absl::StatusOr<Tokens> FromModel(const Options& options, const std::string& text) {
  absl::StatusOr<std::unique_ptr<ModelFile>> file = ModelFile::Open(options.model);
  if (!file.ok()) return file.status();
  auto tokenizer = Tokenizer::Create((*file)->vocabulary());
  if (!tokenizer.ok()) return tokenizer.status();
  absl::StatusOr<std::vector<int32_t>> ids = options.chat
                                                 ? EncodeChat(options, **tokenizer, text)
                                                 : EncodeText(**tokenizer, text, options.special);
  if (!ids.ok()) return ids.status();
  Tokens tokens{.ids = *std::move(ids), .pieces = {}};
  for (const int32_t id : tokens.ids) tokens.pieces.emplace_back((*tokenizer)->TokenBytes(id));
  return tokens;
}

// Printable ASCII and whole UTF-8 as they are; the rest as \n, \t, \\ or \xNN.
std::string Escape(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const unsigned char c = bytes.front();
    const size_t wide = ValidUtf8Prefix(bytes.substr(0, 4));
    size_t taken = 1;
    if (c == '\n') {
      text += "\\n";
    } else if (c == '\t') {
      text += "\\t";
    } else if (c == '\\') {
      text += "\\\\";
    } else if (c >= 0x80 && wide > 0) {
      while (taken < wide && (static_cast<unsigned char>(bytes[taken]) & 0xC0) == 0x80) ++taken;
      text += bytes.substr(0, taken);
    } else if (c < 0x20 || c >= 0x7F) {
      text += fmt::format("\\x{:02X}", c);
    } else {
      text += static_cast<char>(c);
    }
    bytes.remove_prefix(taken);
  }
  return text;
}

absl::Status Run(const Options& options, bool local) {
  absl::StatusOr<std::string> text = ReadText(options.input);
  if (!text.ok()) return text.status();
  absl::StatusOr<Tokens> tokens = local ? FromModel(options, *text) : FromServer(options, *text);
  if (!tokens.ok()) return tokens.status();
  if (options.json) {
    std::vector<std::string> pieces;
    for (const std::string& piece : tokens->pieces) pieces.push_back(Escape(piece));
    fmt::print("{}\n", nlohmann::ordered_json{{"ids", tokens->ids}, {"pieces", pieces}}.dump());
  } else if (options.ids) {
    fmt::print("{}\n", fmt::join(tokens->ids, " "));
  } else {
    for (size_t i = 0; i < tokens->ids.size(); ++i) {
      fmt::print("{:>7} {}\n", tokens->ids[i], Escape(tokens->pieces[i]));
    }
  }
  return absl::OkStatus();
}

}  // namespace

void AddTokenize(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand("tokenize", "Print the tokens of a text: ids and pieces");
  AddTextInput(*sub, &options->input);
  CLI::Option* model =
      sub->add_option("--model", options->model,
                      "Use the tokenizer of this .gguf file or model folder instead of a server")
          ->type_name("PATH");
  CLI::Option* chat = sub->add_flag(
      "--chat", options->chat, "The text is a user's message, put into the model's chat template");
  sub->add_option("--system", options->system, "System message before it")
      ->type_name("TEXT")
      ->needs(chat);
  sub->add_flag("--special", options->special,
                "Strings of special tokens in the text become their tokens");
  sub->add_flag("--ids", options->ids, "Print the ids only, on one line");
  sub->add_flag("--json", options->json, "Print one JSON object: ids and pieces");
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([=] {
    const bool local = IsLocal(model, sub->get_option("--address"));
    *action = [options, local] { return Run(*options, local); };
  });
}

}  // namespace espalier
