// `espalier budget`: what memory a server has, and changing it while it serves.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/remote.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  uint64_t bytes = 0;
  bool sets = false;
};

constexpr int kLooks = 10;  // a tenth of a second each

std::string MiB(uint64_t bytes) { return fmt::format("{:.1f} MiB", bytes / 1048576.0); }

absl::Status Run(const Options& options) {
  v1::MemoryLedger memory;
  if (options.sets) {
    v1::SetMemoryBudgetRequest request;
    request.set_bytes(options.bytes);
    v1::SetMemoryBudgetResponse response;
    const absl::Status status =
        UnaryCall(options.remote, &v1::EspalierService::Stub::SetMemoryBudget, request, &response);
    if (!status.ok()) return status;
    memory = response.memory();
    // Weights leave between steps: until then there may seem to be nothing for KV.
    for (int look = 0; look < kLooks && memory.kv_allowed() == 0; ++look) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      v1::GetLoadResponse load;
      const absl::Status looked = UnaryCall(options.remote, &v1::EspalierService::Stub::GetLoad,
                                            v1::GetLoadRequest(), &load);
      if (!looked.ok()) return looked;
      memory = load.memory();
    }
  } else {
    v1::GetLoadResponse load;
    const absl::Status status =
        UnaryCall(options.remote, &v1::EspalierService::Stub::GetLoad, v1::GetLoadRequest(), &load);
    if (!status.ok()) return status;
    memory = load.memory();
  }
  const std::string released =
      memory.weights_released() > 0
          ? fmt::format(" (and {} released)", MiB(memory.weights_released()))
          : "";
  fmt::print("budget {}, resident {}: weights {}{}, workspace {}, KV {} of {} that it may have\n",
             memory.budget() > 0 ? MiB(memory.budget()) : "none", MiB(memory.resident()),
             MiB(memory.weights()), released, MiB(memory.workspace()),
             MiB(memory.kv_used() + memory.kv_reusable()), MiB(memory.kv_allowed()));
  if (memory.kv_allowed() == 0) {
    fmt::print(stderr,
               "espalier: no memory is left for KV beside weights and workspace: new requests are "
               "refused\n");
  }
  return absl::OkStatus();
}

// CLI11 wraps a negative size and cuts a large one. Looked at before it is read.
CLI::Validator IsSize() {
  const auto check = [](std::string& text) -> std::string {
    constexpr size_t kMostDigits = 15;  // a petabyte
    const auto digits = std::ranges::count_if(text, [](char c) { return c >= '0' && c <= '9'; });
    const bool plain = text.find_first_of("-+.") == std::string::npos;
    return plain && digits >= 1 && digits <= static_cast<int64_t>(kMostDigits)
               ? ""
               : fmt::format("expected whole bytes or a size such as 180MB, got {}", text);
  };
  return CLI::Validator(check, "");
}

}  // namespace

void AddBudget(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "budget", "Print what memory a server has; with SIZE: change its budget while it serves");
  CLI::Option* size =
      sub->add_option("size", options->bytes,
                      "Memory for the server's process, e.g. 180MB; 0: what the machine has. The "
                      "server must run with --admin")
          ->type_name("SIZE")
          ->transform(CLI::AsSizeValue(false))
          ->transform(IsSize());
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([options, action, size] {
    options->sets = size->count() > 0;
    *action = [options] { return Run(*options); };
  });
}

}  // namespace espalier
