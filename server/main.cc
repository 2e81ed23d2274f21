// espalier-server: reads the options and serves.
#include <fmt/format.h>

#include <cstdio>
#include <optional>

#include "server/options.h"
#include "server/server.h"

int main(int argc, char** argv) {
  const absl::StatusOr<std::optional<espalier::ServerOptions>> options =
      espalier::ParseServerOptions(argc, argv);
  if (!options.ok()) {
    const absl::string_view message = options.status().message();
    fmt::print(stderr, "espalier-server: {}\n", std::string_view(message.data(), message.size()));
    return 2;
  }
  if (!options->has_value()) return 0;
  return espalier::RunServer(**options);
}
