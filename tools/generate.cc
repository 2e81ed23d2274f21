// `espalier generate`: continues a raw text.
#include <fmt/format.h>
#include <google/protobuf/util/json_util.h>

#include <cstdio>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/generation.h"
#include "tools/remote.h"
#include "tools/text_input.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  GenerationOptions generation;
  TextInput prompt;
  bool special = false;
  bool json = false;
  bool quiet = false;
};

void Print(const v1::GenerateResponse& response, bool json) {
  std::string text = response.text();
  if (json) {
    text.clear();
    google::protobuf::util::JsonPrintOptions names;
    names.preserve_proto_field_names = true;
    const auto status = google::protobuf::util::MessageToJsonString(response, &text, names);
    if (!status.ok()) return;  // a text that is not UTF-8 would not have been parsed
    text += '\n';
  } else if (response.logprobs_size() > 0) {
    text.clear();
    for (const v1::TokenLogprob& token : response.logprobs()) {
      text += fmt::format("{:>7} {:9.4f} ", token.token_id(), token.logprob());
      for (const v1::TokenCandidate& top : token.top()) {
        text += fmt::format(" {}:{:.4f}", top.token_id(), top.logprob());
      }
      text += '\n';
    }
  }
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

absl::Status Run(const Options& options) {
  absl::StatusOr<std::string> prompt = ReadText(options.prompt);
  if (!prompt.ok()) return prompt.status();
  v1::GenerateRequest request = ToRequest(options.generation);
  request.set_model(options.remote.model_name);
  request.set_text(*prompt);
  request.set_parse_special(options.special);

  const auto stub = v1::EspalierService::NewStub(Connect(options.remote));
  absl::StatusOr<StreamResult> result =
      StreamGenerate(stub.get(), options.remote, request,
                     [&](const v1::GenerateResponse& response) { Print(response, options.json); });
  if (!options.json) fmt::print("\n");
  if (!result.ok()) return result.status();
  if (!options.quiet) fmt::print(stderr, "{}", Summary(*result));
  return absl::OkStatus();
}

}  // namespace

void AddGenerate(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand("generate", "Continue a raw text, token by token");
  AddTextInput(*sub, &options->prompt);
  sub->add_flag("--special", options->special,
                "Strings of special tokens in the text become their tokens");
  sub->add_flag("--json", options->json, "Print every message as one line of JSON");
  sub->add_flag("--quiet", options->quiet, "No times and no `served` line on stderr");
  AddRemoteOptions(*sub, &options->remote);
  AddGenerationOptions(*sub, &options->generation);
  sub->final_callback([options, action] {
    CheckTogether(options->generation);
    *action = [options] { return Run(*options); };
  });
}

}  // namespace espalier
