// `espalier budget`: what memory a server has, and changing it while it serves.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
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
  std::string size;  // empty: only looks
  v1::SetMemoryBudgetRequest budget;
};

constexpr int kLooks = 10;  // a tenth of a second each

std::string MiB(uint64_t bytes) { return fmt::format("{:.1f} MiB", bytes / 1048576.0); }

absl::Status Look(const RemoteOptions& remote, v1::MemoryLedger* memory) {
  v1::GetLoadResponse load;
  const absl::Status status =
      UnaryCall(remote, &v1::EspalierService::Stub::GetLoad, v1::GetLoadRequest(), &load);
  *memory = load.memory();
  return status;
}

absl::Status Run(const Options& options) {
  v1::MemoryLedger memory;
  if (!options.size.empty()) {
    v1::SetMemoryBudgetResponse response;
    const absl::Status status = UnaryCall(
        options.remote, &v1::EspalierService::Stub::SetMemoryBudget, options.budget, &response);
    if (!status.ok()) return status;
    memory = response.memory();
    // Weights leave between steps: until then there may seem to be nothing for KV.
    for (int look = 0; look < kLooks && memory.kv_allowed() == 0; ++look) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (absl::Status looked = Look(options.remote, &memory); !looked.ok()) return looked;
    }
  } else if (absl::Status looked = Look(options.remote, &memory); !looked.ok()) {
    return looked;
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
    fmt::print(
        stderr,
        "espalier: no memory is left for KV beside the weights that are there and workspace: "
        "new requests are refused, unless weights can leave for them\n");
  }
  return absl::OkStatus();
}

// Into `budget`: bytes with a unit, a share with %, or 0.
bool ReadBudget(std::string text, v1::SetMemoryBudgetRequest* budget) {
  constexpr uint64_t kLeast = 1 << 20;  // 180 is 180MB, mistyped
  constexpr size_t kMostDigits = 15;    // CLI11 wraps a negative size and cuts a large one
  const auto digits =
      static_cast<size_t>(std::ranges::count_if(text, [](char c) { return c >= '0' && c <= '9'; }));
  if (digits == 0 || digits > kMostDigits || text.find_first_of("-+") != text.npos) return false;
  if (text.ends_with('%')) {
    double percent = 0;
    const char* const end = text.data() + text.size() - 1;
    const auto read = std::from_chars(text.data(), end, percent);
    if (read.ec != std::errc() || read.ptr != end || !(percent >= 1 && percent <= 100))
      return false;
    budget->set_share(percent / 100);
    return true;
  }
  uint64_t bytes = 0;
  if (text.find('.') != text.npos || !CLI::AsSizeValue(/*kb_is_1000=*/true)(text).empty() ||
      !CLI::detail::lexical_cast(text, bytes) || (bytes > 0 && bytes < kLeast)) {
    return false;
  }
  budget->set_bytes(bytes);
  return true;
}

}  // namespace

void AddBudget(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "budget", "Print what memory a server has; with SIZE: change its budget while it serves");
  sub->add_option("size", options->size,
                  "Memory for the server's process, e.g. 180MB; 60%: of what the machine, or the "
                  "container, has; 0: all of that. The server must run with --admin")
      ->type_name("SIZE")
      ->check([options](const std::string& text) -> std::string {
        return ReadBudget(text, &options->budget)
                   ? ""
                   : fmt::format(
                         "expected a whole size such as 180MB or 180MiB, from 1MiB, a share of 1% "
                         "to 100%, or 0, got {}",
                         text);
      });
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
