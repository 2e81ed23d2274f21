// `espalier decisions`: why a server prunes, or refuses.
#include <fmt/format.h>

#include <memory>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/remote.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  int last = 0;
};

absl::Status Run(const Options& options) {
  v1::GetDecisionsRequest request;
  request.set_last(options.last);
  v1::GetDecisionsResponse response;
  const absl::Status status =
      UnaryCall(options.remote, &v1::EspalierService::Stub::GetDecisions, request, &response);
  if (status.ok()) fmt::print("{}", response.log());
  return status;
}

}  // namespace

void AddDecisions(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "decisions",
      "Print a server's last decisions on pruning, with what its policy saw: lines of JSON");
  sub->add_option("--last", options->last,
                  "Lines, at most; 0: all that are kept, a thousand or more")
      ->type_name("COUNT")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
