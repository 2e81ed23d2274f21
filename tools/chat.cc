// `espalier chat`: a conversation with the model, streamed token by token.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <utility>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/generation.h"
#include "tools/remote.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  GenerationOptions generation;
  std::string once;
  std::string system;
  bool quiet = false;
};

class Conversation {
 public:
  explicit Conversation(const Options& options)
      : options_(options), stub_(v1::EspalierService::NewStub(Connect(options.remote))) {
    Restart();
  }

  void Restart() {
    request_ = ToRequest(options_.generation);
    request_.set_model(options_.remote.model_name);
    request_.mutable_chat();
    if (!options_.system.empty()) Say("system", options_.system);
  }

  // Streams the answer to stdout. A question that got no answer leaves the conversation as it was.
  absl::Status Ask(std::string question) {
    Say("user", std::move(question));
    std::string answer;
    absl::StatusOr<StreamResult> result = StreamGenerate(
        stub_.get(), options_.remote, request_, [&](const v1::GenerateResponse& response) {
          answer += response.text();
          std::fwrite(response.text().data(), 1, response.text().size(), stdout);
          std::fflush(stdout);
        });
    fmt::print("\n");
    if (!result.ok()) {
      request_.mutable_chat()->mutable_messages()->RemoveLast();
      return result.status();
    }
    Say("assistant", std::move(answer));
    if (!options_.quiet) fmt::print(stderr, "{}", Summary(*result));
    return absl::OkStatus();
  }

 private:
  void Say(const char* role, std::string content) {
    v1::ChatMessage& message = *request_.mutable_chat()->add_messages();
    message.set_role(role);
    message.set_content(std::move(content));
  }

  const Options& options_;
  std::unique_ptr<v1::EspalierService::Stub> stub_;
  v1::GenerateRequest request_;
};

absl::Status Run(const Options& options) {
  Conversation conversation(options);
  if (!options.once.empty()) return conversation.Ask(options.once);

  const bool terminal = isatty(STDIN_FILENO) == 1;
  if (terminal) fmt::print(stderr, "/reset forgets the conversation; /quit or Ctrl-D ends it.\n");
  for (std::string line;;) {
    if (terminal) fmt::print(stderr, "> ");
    if (!std::getline(std::cin, line) || line == "/quit") return absl::OkStatus();
    if (line.empty()) continue;
    if (line == "/reset") {
      conversation.Restart();
      continue;
    }
    const absl::Status status = conversation.Ask(line);
    // At a terminal a failed answer is told and the conversation goes on; a script ends.
    if (!status.ok() && (!terminal || status.code() == absl::StatusCode::kCancelled)) return status;
    if (!status.ok()) fmt::print(stderr, "espalier: {}\n", std::string(status.message()));
  }
}

}  // namespace

void AddChat(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand("chat", "Talk to the model, or ask it once");
  sub->add_option("--once", options->once,
                  "Ask this and end; else questions are read line by line from standard input")
      ->type_name("TEXT");
  sub->add_option("--system", options->system, "System message; empty: the model's own default")
      ->type_name("TEXT");
  sub->add_flag("--quiet", options->quiet, "No times and no `served` line on stderr");
  AddRemoteOptions(*sub, &options->remote);
  AddGenerationOptions(*sub, &options->generation);
  sub->final_callback([options, action] {
    CheckTogether(options->generation);
    *action = [options] { return Run(*options); };
  });
}

}  // namespace espalier
