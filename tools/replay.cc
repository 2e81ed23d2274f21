// `espalier replay`: a server's decisions again, from what its policy saw.
#include <fmt/format.h>

#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "engine/model/policy_file.h"
#include "policy/ladder_file.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "tools/command.h"

namespace espalier {
namespace {

using Json = nlohmann::json;

struct Options {
  std::string log;
  std::string ladder;
  std::string network;
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
          // Before version 2 load could cost anything.
          .load_loss = line.at("version") == 1 ? std::numeric_limits<double>::infinity()
                                               : line.at("load_loss").get<double>(),
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
          .memory_age_s = line.value("memory_age_s", 0.0),
          .running = line.at("running"),
          .waiting = line.at("waiting")};
}

absl::Status Run(const Options& options) {
  const absl::StatusOr<Ladder> ladder = ReadLadder(options.ladder);
  if (!ladder.ok()) return ladder.status();
  std::ifstream file(options.log);
  if (!file) return absl::NotFoundError(fmt::format("{}: cannot be read", options.log));
  std::unique_ptr<Policy> policy, learned;
  std::optional<PolicyFile> network;
  int64_t decisions = 0, changes = 0, differ = 0;
  std::string text, first;
  for (int number = 1; std::getline(file, text); ++number) {
    try {
      const Json line = Json::parse(text);
      if (policy == nullptr) {
        const std::string name = line.at("policy");
        if ((name != "ladder" && name != "dqn") ||
            (line.at("version") != 1 && line.at("version") != 2)) {
          return absl::InvalidArgumentError(
              fmt::format("{}: line 1: of another policy or version", options.log));
        }
        const LadderPolicyOptions rule = OptionsOf(line);
        if (name == "ladder") {
          policy = std::make_unique<LadderPolicy>(rule);
          continue;
        }
        absl::StatusOr<PolicyFile> file =
            OpenPolicy(options.network.empty() ? PolicyPathOf(options.ladder) : options.network,
                       ladder->size());
        if (!file.ok()) return file.status();
        if (file->version != line.at("network").get<std::string>()) {
          return absl::FailedPreconditionError(
              fmt::format("{}: line 1: of network {}, not {}", options.log,
                          line.at("network").get<std::string>(), file->version));
        }
        network = *std::move(file);
        learned =
            std::make_unique<DqnPolicy>(LevelOptionsOf(network->trained, rule), &network->network);
        policy = std::make_unique<Shield>(learned.get(), rule);
        continue;
      }
      if (line.contains("dropped")) {
        return absl::DataLossError(fmt::format("{}: line {}: {} decisions are missing", options.log,
                                               number, line.at("dropped").get<int64_t>()));
      }
      const int before = policy->wanted();
      policy->Observe(ReportOf(line), *ladder);
      ++decisions;
      changes += policy->wanted() != before;
      const int rung = line.at("rung");
      const std::string reason = line.at("reason");
      if (policy->wanted() == rung && policy->reason() == reason) continue;
      if (differ++ == 0) {
        first = fmt::format("line {}: rung {} by {}, logged {} by {}", number, policy->wanted(),
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
  sub->add_option(
         "--policy-file", options->network,
         "The network that it was served with, of a dqn policy; default: beside the ladder")
      ->type_name("PATH");
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
