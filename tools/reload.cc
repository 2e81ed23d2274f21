// `espalier reload`: other weights for a server that goes on serving.
#include <fmt/format.h>

#include <memory>
#include <string>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/remote.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  std::string model;
  std::string ladder;
  bool without_ladder = false;
};

absl::Status Run(const Options& options) {
  v1::ReloadModelRequest request;
  request.set_model(options.model);
  request.set_ladder(options.ladder);
  request.set_without_ladder(options.without_ladder);
  v1::ReloadModelResponse response;
  const absl::Status status =
      UnaryCall(options.remote, &v1::EspalierService::Stub::ReloadModel, request, &response);
  if (!status.ok()) return status;
  fmt::print("{}, {} weights, {} rungs, loaded in {:.2f} s; {} requests finish on those before\n",
             response.name(), response.weight_type(), response.rungs(),
             static_cast<double>(response.loading().seconds()) + 1e-9 * response.loading().nanos(),
             response.requests_before());
  return absl::OkStatus();
}

}  // namespace

void AddReload(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "reload", "Replace the weights of a server's model while it serves, by a pruned one say");
  sub->add_option("model", options->model,
                  "A .gguf file or a folder on the server's machine, of the same dimensions and "
                  "words; left out: the one that is served, read anew. The server must run with "
                  "--admin")
      ->type_name("PATH");
  CLI::Option* ladder =
      sub->add_option("--ladder", options->ladder,
                      "A ladder for it, on the server's machine; left out: the served one, if it "
                      "fits")
          ->type_name("PATH");
  sub->add_flag("--without-ladder", options->without_ladder, "Serve the full model only")
      ->excludes(ladder);
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
