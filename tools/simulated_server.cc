#include "tools/simulated_server.h"

#include <fmt/format.h>

#include <fstream>
#include <type_traits>

#include <CLI/CLI.hpp>

#include "policy/ladder_file.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), {});
  if (!file) return absl::NotFoundError(fmt::format("{}: cannot be read", path));
  return text;
}

}  // namespace

void AddSimulatedServerOptions(CLI::App& sub, SimulatedServerOptions* options) {
  sub.add_option("--ladder", options->ladder, "What may be served at")
      ->type_name("PATH")
      ->required();
  sub.add_option("--costs", options->costs, "What its steps take: of `espalier bench --fit`")
      ->type_name("PATH")
      ->required();
  const auto number = [&](const char* name, auto& value, auto least, auto most, const char* unit,
                          const char* description) {
    CLI::Option* const option = sub.add_option(name, value, description)->type_name(unit);
    if constexpr (std::is_floating_point_v<decltype(least)>) {
      option->check(Within(least, most));  // which NaN is not
    } else {
      option->check(CLI::Range(least, most));
    }
    option->capture_default_str();
  };
  number("--kv-memory", options->kv_mib, 0.01, 1e7, "MIB", "Of the KV pool");
  number("--max-sequences", options->max_sequences, 1, 4096, "COUNT", "That run at once");
  number("--max-batch-tokens", options->max_batch_tokens, 1, 65536, "TOKENS", "Rows of a step");
  number("--max-waiting", options->max_waiting, 1, 1'000'000, "COUNT", "Calls that wait");
  number("--step-overhead", options->overhead_ms, 0.0, 1e3, "MS",
         "Of a server's step beyond the engine's: streams, the network, its clients");
  number("--ttft-target", options->ttft_target, 1e-3, 1e4, "SECONDS", "For a first token");
  number("--tpot-target", options->tpot_target, 1e-4, 1e3, "SECONDS", "For a token after it");
  number("--load-loss", options->load_loss, 0.0, 100.0, "NATS",
         "What waiting and slow steps alone may cost a token, as told; memory may cost more");
}

LadderPolicyOptions RuleOf(const SimulatedServerOptions& options) {
  return {.ttft_target_s = options.ttft_target,
          .tpot_target_s = options.tpot_target,
          .load_loss = options.load_loss};
}

LevelPolicyOptions LevelOf(const SimulatedServerOptions& options) {
  return {.ttft_target_s = options.ttft_target,
          .tpot_target_s = options.tpot_target,
          .load_loss = options.load_loss};
}

absl::StatusOr<SimulatedServer> MakeSimulatedServer(const SimulatedServerOptions& options) {
  SimulatedServer server;
  std::string error;
  const absl::StatusOr<std::string> ladder = ReadText(options.ladder);
  if (!ladder.ok()) return ladder.status();
  if (!ParseLadder(*ladder, &server.ladder, &error)) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", options.ladder, error));
  }
  const absl::StatusOr<std::string> costs = ReadText(options.costs);
  if (!costs.ok()) return costs.status();
  if (!ParseCosts(*costs, &server.costs, &error)) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", options.costs, error));
  }
  if (static_cast<int>(server.costs.rungs.size()) != server.ladder.size()) {
    return absl::InvalidArgumentError(fmt::format("{} has {} rungs, {} has {}", options.costs,
                                                  server.costs.rungs.size(), options.ladder,
                                                  server.ladder.size()));
  }
  const int layers = server.ladder.rung(0).prefill.widths().layers;
  const double token_bytes = server.ladder.rung(0).price.kv_bytes_per_token;
  if (token_bytes <= 0) {
    return absl::InvalidArgumentError(
        fmt::format("{}: rung 0 does not tell its KV bytes a token", options.ladder));
  }
  constexpr int kPageTokens = KvGeometry{}.page_tokens;
  const auto tokens = static_cast<int64_t>(options.kv_mib * 1048576 / token_bytes);
  if (tokens < kPageTokens) {
    return absl::InvalidArgumentError("--kv-memory: not a page of each layer");
  }
  server.options = {.scheduler = {.max_batch_tokens = options.max_batch_tokens,
                                  .max_sequences = options.max_sequences,
                                  .max_waiting = options.max_waiting,
                                  .prefix_cache = false},
                    .geometry = {.layers = layers,
                                 .pages = static_cast<int>(tokens / kPageTokens) * layers,
                                 .page_tokens = kPageTokens,
                                 .context = 1 << 20},
                    .step_overhead_s = 1e-3 * options.overhead_ms,
                    .ttft_target_s = options.ttft_target,
                    .tpot_target_s = options.tpot_target};
  return server;
}

}  // namespace espalier
