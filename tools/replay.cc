// `espalier replay`: a server's decisions again, from what its policy saw.
#include <fmt/format.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "engine/model/policy_file.h"
#include "policy/capped_policy.h"
#include "policy/ladder_file.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "tools/command.h"

namespace espalier {
namespace {

using Json = nlohmann::json;

constexpr int64_t kInts = std::numeric_limits<int>::max();

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
  int64_t Count(const char* name, int64_t most = kInts, int64_t least = 0) {
    const Json& value = Find(name);
    if (value.is_number_integer() || !value.is_number()) {
      return static_cast<int64_t>(
          Within(name, value, static_cast<double>(least), static_cast<double>(most)));
    }
    Expected(name, fmt::format("a whole number from {} to {}", least, most), value);
    return 0;
  }
  // Rungs, of which rung 0 is always one.
  RungSet Bits(const char* name) {
    const Json& value = Find(name);
    if (value.is_number_unsigned() && (value.get<RungSet>() & 1) != 0) return value.get<RungSet>();
    Expected(name, "an odd whole number", value);
    return 1;
  }
  std::vector<double> Numbers(const char* name, int count, double least = 0) {
    const Json& value = Find(name);
    if (!value.is_array() || value.size() != static_cast<size_t>(count)) {
      Expected(name, fmt::format("{} numbers", count), value);
      return {};
    }
    std::vector<double> numbers;
    for (const Json& number : value) numbers.push_back(Within(name, number, least, kMost));
    return numbers;
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
    const double number = value.is_number() ? value.get<double>() : std::nan("");
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

LadderPolicyOptions OptionsOf(Fields* line) {
  constexpr double kLeast = 1e-6;  // seconds of a target or a dwell, which are divided by
  return {.ttft_target_s = line->Number("ttft_target_s", kLeast),
          .tpot_target_s = line->Number("tpot_target_s", kLeast),
          .kv_lower = line->Number("kv_lower"),
          .load_loss = line->Number("load_loss"),
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
          .memory_age_s = line->Number("memory_age_s"),
          .free_memory = line->Number("free_memory"),
          .foreign_memory = line->Number("foreign_memory"),
          .first_token_s = line->Number("first_token_s"),
          .arrivals_per_s = line->Number("arrivals_per_s"),
          .running = static_cast<int>(line->Count("running")),
          .waiting = static_cast<int>(line->Count("waiting"))};
}

RequestTraits TraitsOf(Fields* line) {
  return {.allowed = line->Bits("allowed"),
          .priority = static_cast<int>(line->Count("priority", kInts, -kInts - 1))};
}

// A server's policy anew, and how far it decides alike.
class Replay {
 public:
  Replay(const Options& options, Ladder ladder) : options_(options), ladder_(std::move(ladder)) {}

  absl::Status Take(Fields* line) {
    if (policy_ == nullptr) return Make(line);
    if (line->Has("dropped")) {
      const int64_t dropped = line->Count("dropped", int64_t{1} << 53);
      if (!line->error().empty()) return absl::OkStatus();  // told by who asked
      return absl::DataLossError(fmt::format("{} decisions are missing", dropped));
    }
    if (line->Has("losses")) {
      const std::vector<double> losses = line->Numbers("losses", ladder_.size());
      for (size_t rung = 0; rung < losses.size(); ++rung) {
        ladder_.SetQualityLoss(static_cast<int>(rung), losses[rung]);
      }
    } else if (line->Has("cap")) {
      capped_->set_hardest(static_cast<int>(line->Count("cap", kMostRungs)));
    } else if (line->Has("request")) {
      TakeChoice(line);
    } else {
      TakeReport(line);
    }
    return absl::OkStatus();
  }

  bool made() const { return policy_ != nullptr; }
  // What was decided for the last line, and what it says, if that is something else; else "".
  std::string TakeDifference() { return std::exchange(difference_, ""); }
  int64_t decisions() const { return decisions_; }
  int64_t changes() const { return changes_; }  // of the level
  int64_t choices() const { return choices_; }  // for requests

 private:
  absl::Status Make(Fields* line) {
    const std::string name = line->Text("policy");
    const int64_t version = line->Count("version");
    if (!line->error().empty()) return absl::OkStatus();
    if ((name != "ladder" && name != "dqn") || version != 3) {
      return absl::InvalidArgumentError("of another policy or version");
    }
    const LadderPolicyOptions rule = OptionsOf(line);
    const std::string logged = line->Text("network");
    if (!line->error().empty()) return absl::OkStatus();
    if (name == "ladder") {
      policy_ = std::make_unique<LadderPolicy>(rule);
    } else {
      absl::StatusOr<PolicyFile> file =
          OpenPolicy(options_.network.empty() ? PolicyPathOf(options_.ladder) : options_.network,
                     ladder_.size());
      if (!file.ok()) return file.status();
      if (file->version != logged) {
        return absl::FailedPreconditionError(
            fmt::format("of network {}, not {}", logged, file->version));
      }
      network_ = *std::move(file);
      learned_ =
          std::make_unique<DqnPolicy>(LevelOptionsOf(network_->trained, rule), &network_->network);
      policy_ = std::make_unique<Shield>(learned_.get(), rule);
    }
    capped_.emplace(policy_.get());
    return absl::OkStatus();
  }

  void TakeReport(Fields* line) {
    const PressureReport report = ReportOf(line);
    const Decided logged{.rung = static_cast<int>(line->Count("rung", kMostRungs - 1)),
                         .hardest = static_cast<int>(line->Count("hardest", kMostRungs - 1)),
                         .reason = line->Text("reason"),
                         .refuses_behind_s = line->Has("refuses_behind_s")
                                                 ? line->Number("refuses_behind_s")
                                                 : Policy::kNobody};
    if (!line->error().empty()) return;
    const int before = capped_->wanted();
    capped_->Observe(report, ladder_);
    ++decisions_;
    changes_ += capped_->wanted() != before;
    const Decided now{.rung = capped_->wanted(),
                      .hardest = capped_->hardest_open(),
                      .reason = std::string(capped_->reason()),
                      .refuses_behind_s = capped_->refuses_behind_s()};
    if (now != logged) difference_ = fmt::format("{}, logged {}", now.Text(), logged.Text());
    if (line->Has("scores")) TakeScores(line);
  }

  // Another build's may differ in the last digits.
  void TakeScores(Fields* line) {
    const std::span<const float> scores = capped_->scores();
    const std::vector<double> logged =
        line->Numbers("scores", static_cast<int>(scores.size()), -1e12);
    for (size_t i = 0; i < logged.size(); ++i) {
      if (std::abs(scores[i] - logged[i]) <= 1e-3 * (1 + std::abs(logged[i]))) continue;
      difference_ = fmt::format("scores[{}] {}, logged {}", i, scores[i], logged[i]);
    }
  }

  void TakeChoice(Fields* line) {
    const RequestTraits traits = TraitsOf(line);
    const auto logged = static_cast<int>(line->Count("wanted", kMostRungs - 1));
    const auto rung_served = static_cast<int>(line->Count("rung", kMostRungs - 1));
    if (!line->error().empty()) return;
    ++choices_;
    const int rung = capped_->ChooseRung(traits);
    if (!Has(traits.allowed, rung_served)) {
      difference_ = fmt::format("rung {} is none that was allowed", rung_served);
    }
    if (rung != logged) difference_ = fmt::format("rung {}, logged {}", rung, logged);
  }

  struct Decided {
    int rung = 0, hardest = 0;
    std::string reason;
    double refuses_behind_s = 0;
    bool operator==(const Decided&) const = default;
    std::string Text() const {
      return fmt::format("rung {} of {} by {}{}", rung, hardest, reason,
                         std::isfinite(refuses_behind_s)
                             ? fmt::format(", refusing behind {} s", refuses_behind_s)
                             : "");
    }
  };

  const Options& options_;
  Ladder ladder_;
  std::unique_ptr<Policy> learned_, policy_;
  std::optional<PolicyFile> network_;
  std::optional<CappedPolicy> capped_;
  std::string difference_;
  int64_t decisions_ = 0, changes_ = 0, choices_ = 0;
};

absl::Status Run(const Options& options) {
  absl::StatusOr<Ladder> ladder = ReadLadder(options.ladder);
  if (!ladder.ok()) return ladder.status();
  std::ifstream file(options.log);
  if (!file) return absl::NotFoundError(fmt::format("{}: cannot be read", options.log));
  Replay replay(options, *std::move(ladder));
  int64_t differ = 0;
  std::string text, first;
  for (int number = 1; std::getline(file, text); ++number) {
    const auto at_line = [&](std::string_view what) {
      return fmt::format("{}: line {}: {}", options.log, number, what);
    };
    try {
      const Json line = Json::parse(text);
      Fields fields(line);
      if (absl::Status status = replay.Take(&fields); !status.ok()) {
        return {status.code(), at_line({status.message().data(), status.message().size()})};
      }
      if (!fields.error().empty()) return absl::InvalidArgumentError(at_line(fields.error()));
    } catch (const Json::exception& error) {
      if (!replay.made()) {
        return absl::InvalidArgumentError(fmt::format("{}: is no decision log", options.log));
      }
      if (!file.eof()) return absl::InvalidArgumentError(at_line(error.what()));
      fmt::print(stderr, "warning: {}\n", at_line("is cut, and left out"));
      break;
    }
    const std::string difference = replay.TakeDifference();
    if (!difference.empty() && differ++ == 0) first = at_line(difference);
  }
  if (!replay.made()) return absl::InvalidArgumentError(fmt::format("{}: empty", options.log));
  fmt::print("{} decisions, {} changes of the level, {} rungs of requests, {} not as logged\n",
             replay.decisions(), replay.changes(), replay.choices(), differ);
  return differ == 0 ? absl::OkStatus() : absl::FailedPreconditionError(first);
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
