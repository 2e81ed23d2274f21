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

// Reads a line's fields, each 0 if it is not as it should be; the first such is what `error` tells.
class Fields {
 public:
  explicit Fields(const Json& line) : line_(line) {}

  bool Has(const char* name) const { return line_.contains(name); }
  double Number(const char* name, double least = 0) {
    return Within(name, Find(name), least, kMost);
  }
  int64_t Count(const char* name, int64_t most = std::numeric_limits<int>::max()) {
    const Json& value = Find(name);
    if (value.is_number_integer() || !value.is_number()) {
      return static_cast<int64_t>(Within(name, value, 0, static_cast<double>(most)));
    }
    Expected(name, fmt::format("a whole number from 0 to {}", most), value);
    return 0;
  }
  PressureBand Band(const char* name) {
    const Json& value = Find(name);
    if (value.is_array() && value.size() == 2) {
      return {.raise = Within(name, value[0], 0, kMost), .lower = Within(name, value[1], 0, kMost)};
    }
    Expected(name, "two numbers", value);
    return {};
  }
  std::string Text(const char* name) {
    const Json& value = Find(name);
    if (value.is_string()) return value.get<std::string>();
    Expected(name, "a text", value);
    return "";
  }

  const std::string& error() const { return error_; }

 private:
  static constexpr double kMost = 1e12;  // of shares and seconds: far beyond any server's

  const Json& Find(const char* name) const {
    static const Json kAbsent;
    const auto found = line_.find(name);
    return found == line_.end() ? kAbsent : *found;
  }
  double Within(const char* name, const Json& value, double least, double most) {
    const double number = value.is_number() ? value.get<double>() : -1;
    if (number >= least && number <= most) return number;
    Expected(name, fmt::format("a number from {} to {}", least, most), value);
    return 0;
  }
  void Expected(const char* name, std::string_view what, const Json& got) {
    if (!error_.empty()) return;
    // What is nested may be so deeply.
    error_ = fmt::format("{}: expected {}, got {}", name, what,
                         got.is_structured() ? got.type_name() : got.dump().substr(0, 64));
  }

  const Json& line_;
  std::string error_;
};

LadderPolicyOptions OptionsOf(int64_t version, Fields* line) {
  constexpr double kLeast = 1e-6;  // seconds of a target or a dwell, which are divided by
  return {.ttft_target_s = line->Number("ttft_target_s", kLeast),
          .tpot_target_s = line->Number("tpot_target_s", kLeast),
          .kv_lower = line->Number("kv_lower"),
          // Before version 2 load could cost anything.
          .load_loss =
              version == 1 ? std::numeric_limits<double>::infinity() : line->Number("load_loss"),
          .wait = line->Band("wait"),
          .step = line->Band("step"),
          .raise_dwell_s = line->Number("raise_dwell_s"),
          .lower_dwell_s = line->Number("lower_dwell_s", kLeast)};
}

PressureReport ReportOf(Fields* line) {
  return {.time_s = line->Number("time_s"),
          .kv_used = line->Number("kv_used"),
          .kv_promised = line->Number("kv_promised"),
          .queue_length = line->Number("queue_length"),
          .oldest_wait_s = line->Number("oldest_wait_s"),
          .step_s = line->Number("step_s"),
          .memory_age_s = line->Has("memory_age_s") ? line->Number("memory_age_s") : 0,
          .running = static_cast<int>(line->Count("running")),
          .waiting = static_cast<int>(line->Count("waiting"))};
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
      Fields fields(line);
      const auto wrong = [&] {
        return absl::InvalidArgumentError(
            fmt::format("{}: line {}: {}", options.log, number, fields.error()));
      };
      if (policy == nullptr) {
        const std::string name = fields.Text("policy");
        const int64_t version = fields.Count("version");
        if (!fields.error().empty()) return wrong();
        if ((name != "ladder" && name != "dqn") || (version != 1 && version != 2)) {
          return absl::InvalidArgumentError(
              fmt::format("{}: line 1: of another policy or version", options.log));
        }
        const LadderPolicyOptions rule = OptionsOf(version, &fields);
        if (!fields.error().empty()) return wrong();
        if (name == "ladder") {
          policy = std::make_unique<LadderPolicy>(rule);
          continue;
        }
        absl::StatusOr<PolicyFile> file =
            OpenPolicy(options.network.empty() ? PolicyPathOf(options.ladder) : options.network,
                       ladder->size());
        if (!file.ok()) return file.status();
        const std::string logged = fields.Text("network");
        if (!fields.error().empty()) return wrong();
        if (file->version != logged) {
          return absl::FailedPreconditionError(
              fmt::format("{}: line 1: of network {}, not {}", options.log, logged, file->version));
        }
        network = *std::move(file);
        learned =
            std::make_unique<DqnPolicy>(LevelOptionsOf(network->trained, rule), &network->network);
        policy = std::make_unique<Shield>(learned.get(), rule);
        continue;
      }
      if (fields.Has("dropped")) {
        const int64_t dropped = fields.Count("dropped", int64_t{1} << 53);
        if (!fields.error().empty()) return wrong();
        return absl::DataLossError(
            fmt::format("{}: line {}: {} decisions are missing", options.log, number, dropped));
      }
      const PressureReport report = ReportOf(&fields);
      const int64_t rung = fields.Count("rung", kMostRungs - 1);
      const std::string reason = fields.Text("reason");
      if (!fields.error().empty()) return wrong();
      const int before = policy->wanted();
      policy->Observe(report, *ladder);
      ++decisions;
      changes += policy->wanted() != before;
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
