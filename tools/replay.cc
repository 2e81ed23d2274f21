// `espalier replay`: a server's decisions again, from what its policy saw.
#include <fmt/format.h>

#include <fstream>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "policy/ladder_file.h"
#include "policy/ladder_policy.h"
#include "tools/command.h"

namespace espalier {
namespace {

using Json = nlohmann::json;

struct Options {
  std::string log;
  std::string ladder;
};

absl::StatusOr<Ladder> ReadLadder(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  Ladder ladder = Ladder::DenseOnly({});
  std::string error;
  if (!file) return absl::NotFoundError(fmt::format("{}: cannot be read", path));
  if (!ParseLadder(text, &ladder, &error)) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", path, error));
  }
  return ladder;
}

LadderPolicyOptions OptionsOf(const Json& line) {
  const auto band = [&](const char* name) {
    return PressureBand{line.at(name).at(0).get<double>(), line.at(name).at(1).get<double>()};
  };
  return {.ttft_target_s = line.at("ttft_target_s"),
          .tpot_target_s = line.at("tpot_target_s"),
          .kv_lower = line.at("kv_lower"),
          .wait = band("wait"),
          .step = band("step"),
          .raise_dwell_s = line.at("raise_dwell_s"),
          .lower_dwell_s = line.at("lower_dwell_s")};
}

PressureReport ReportOf(const Json& line) {
  return {.time_s = line.at("time_s"),
          .kv_used = line.at("kv_used"),
          .kv_promised = line.at("kv_promised"),
          .queue_length = line.at("queue_length"),
          .oldest_wait_s = line.at("oldest_wait_s"),
          .step_s = line.at("step_s"),
          .running = line.at("running"),
          .waiting = line.at("waiting")};
}

absl::Status Run(const Options& options) {
  const absl::StatusOr<Ladder> ladder = ReadLadder(options.ladder);
  if (!ladder.ok()) return ladder.status();
  std::ifstream file(options.log);
  if (!file) return absl::NotFoundError(fmt::format("{}: cannot be read", options.log));
  std::unique_ptr<LadderPolicy> policy;
  int64_t decisions = 0, changes = 0, differ = 0;
  std::string text, first;
  for (int number = 1; std::getline(file, text); ++number) {
    try {
      const Json line = Json::parse(text);
      if (policy == nullptr) {
        if (line.at("policy") != "ladder" || line.at("version") != 1) {
          return absl::InvalidArgumentError(
              fmt::format("{}: line 1: of another policy or version", options.log));
        }
        policy = std::make_unique<LadderPolicy>(OptionsOf(line));
        continue;
      }
      if (line.contains("dropped")) {
        return absl::DataLossError(fmt::format("{}: line {}: {} decisions are missing", options.log,
                                               number, line.at("dropped").get<int64_t>()));
      }
      const int before = policy->level();
      policy->Observe(ReportOf(line), *ladder);
      ++decisions;
      changes += policy->level() != before;
      const int rung = line.at("rung");
      const std::string reason = line.at("reason");
      if (policy->level() == rung && policy->reason() == reason) continue;
      if (differ++ == 0) {
        first = fmt::format("line {}: rung {} by {}, logged {} by {}", number, policy->level(),
                            policy->reason(), rung, reason);
      }
    } catch (const Json::exception& error) {
      return absl::InvalidArgumentError(
          fmt::format("{}: line {}: {}", options.log, number, error.what()));
    }
  }
  if (policy == nullptr) {
    return absl::InvalidArgumentError(fmt::format("{}: empty", options.log));
  }
  fmt::print("{} decisions, {} changes of the level, {} not as logged\n", decisions, changes,
             differ);
  if (differ == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(fmt::format("{}: {}", options.log, first));
}

}  // namespace

void AddReplay(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "replay",
      "Decide again what a server's --decision-log saw; exit code 0 only if all is alike");
  sub->add_option("log", options->log, "The decision log")->type_name("PATH")->required();
  sub->add_option("--ladder", options->ladder, "The ladder that it was served with")
      ->type_name("PATH")
      ->required();
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
