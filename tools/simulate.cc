// `espalier simulate`: a server in virtual time, hours of traffic in seconds.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/model/policy_file.h"
#include "engine/sim/simulation.h"
#include "policy/ladder_file.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "tools/command.h"
#include "tools/simulated_server.h"
#include "tools/statistics.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

struct Options {
  SimulatedServerOptions server;
  std::string policy = "ladder";
  std::string policy_file;
  std::string traffic;
  std::string scenario;
  TrafficOptions made;
  std::string arrivals = "poisson";
  bool json = false;
};

// In its shield, as a server has it.
class ShieldedDqn final : public ForwardingPolicy {
 public:
  ShieldedDqn(QNetwork network, const LevelPolicyOptions& level, const LadderPolicyOptions& rule)
      : ForwardingPolicy(&shield_),
        network_(std::move(network)),
        dqn_(level, &network_),
        shield_(&dqn_, rule) {}

 private:
  QNetwork network_;
  DqnPolicy dqn_;
  Shield shield_;
};

absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const Options& options, const Ladder& ladder) {
  const LadderPolicyOptions rule = RuleOf(options.server);
  if (options.policy == "dqn") {
    const std::string path =
        options.policy_file.empty() ? PolicyPathOf(options.server.ladder) : options.policy_file;
    absl::StatusOr<PolicyFile> file = OpenPolicy(path, ladder.size());
    if (!file.ok()) return file.status();
    if (file->trained.load_loss != rule.load_loss) {
      fmt::print(stderr, "warning: {} was trained for --load-loss {}, not {}\n", path,
                 file->trained.load_loss, rule.load_loss);
    }
    return std::make_unique<ShieldedDqn>(std::move(file->network),
                                         LevelOptionsOf(file->trained, rule), rule);
  }
  if (options.policy == "ladder") {
    return std::make_unique<LadderPolicy>(rule);
  }
  int rung = 0;
  if (options.policy != "off") {
    const std::string number = options.policy.substr(std::string_view("fixed:").size());
    rung = std::stoi(number);
    if (rung >= ladder.size()) {
      return absl::InvalidArgumentError(fmt::format(
          "--policy: fixed:{}, and the ladder has rungs 0 to {}", rung, ladder.size() - 1));
    }
  }
  return std::make_unique<FixedPolicy>(rung);
}

CLI::Validator IsPolicy() {
  return CLI::Validator(
      [](std::string& text) -> std::string {
        const std::string_view number =
            std::string_view(text).substr(std::min<size_t>(6, text.size()));
        const bool fixed = text.starts_with("fixed:") && !number.empty() && number.size() <= 2 &&
                           number.find_first_not_of("0123456789") == number.npos;
        return fixed || text == "ladder" || text == "dqn" || text == "off"
                   ? ""
                   : "expected off, fixed:RUNG, ladder or dqn";
      },
      "");
}

std::string NameOf(const BlockTask& scenario) {
  return fmt::format("{}x{}", scenario.batch, scenario.length);
}

std::vector<std::string> ScenarioNames() {
  std::vector<std::string> names;
  for (const BlockTask& scenario : RapScenarios()) names.push_back(NameOf(scenario));
  return names;
}

// Its batches, so far apart that each is alone even if half of it waits; the server has memory and
// places for a whole one, at rung 0.
Traffic ScenarioTraffic(const std::string& name, SimulatedServer* server) {
  const BlockTask& scenario = *std::ranges::find(RapScenarios(), name, NameOf);
  KvGeometry& geometry = server->options.geometry;
  geometry.pages = geometry.layers * scenario.batch * (scenario.length / geometry.page_tokens + 1);
  int& sequences = server->options.scheduler.max_sequences;
  sequences = std::max(sequences, scenario.batch);
  const RungCost& cost = server->costs.rungs.front();
  const double call = scenario.length * (cost.prefill + cost.decode + cost.fixed +
                                         server->costs.attended * scenario.length);
  return RapTraffic(scenario, scenario.batch * call);
}

absl::StatusOr<Traffic> ReadTraffic(const Options& options) {
  if (options.traffic.empty()) return MakeTraffic(options.made);
  std::ifstream file(options.traffic, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  if (!file) return absl::NotFoundError(fmt::format("{}: cannot be read", options.traffic));
  Traffic traffic;
  std::string error;
  if (!ParseTraffic(text, &traffic, &error)) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", options.traffic, error));
  }
  return traffic;
}

// Of a scenario: how each budget's batch went.
void PrintBatches(const SimReport& report) {
  const size_t batch = report.calls.size() / std::size(kRapBudgets);
  for (size_t i = 0; i < std::size(kRapBudgets); ++i) {
    double seconds = 0, loss = 0;
    int refused = 0;
    for (size_t call = i * batch; call < (i + 1) * batch; ++call) {
      const SimOutcome& outcome = report.calls[call];
      seconds =
          std::max(seconds, outcome.first_token_s + (outcome.tokens - 1) * outcome.per_token_s);
      loss += outcome.loss / static_cast<double>(batch);
      refused += outcome.refused;
    }
    fmt::print("in {:.1f} of the memory: {:.2f} s, refused {}, told loss {:.3f} nats/token\n",
               kRapBudgets[i], seconds, refused, loss);
  }
}

absl::Status Run(Options options) {
  options.made.arrivals = static_cast<Arrivals>(std::ranges::find(kArrivalNames, options.arrivals) -
                                                std::begin(kArrivalNames));
  absl::StatusOr<SimulatedServer> server = MakeSimulatedServer(options.server);
  if (!server.ok()) return server.status();
  const absl::StatusOr<Traffic> traffic =
      options.scenario.empty() ? ReadTraffic(options) : ScenarioTraffic(options.scenario, &*server);
  if (!traffic.ok()) return traffic.status();
  absl::StatusOr<std::unique_ptr<Policy>> policy = MakePolicy(options, server->ladder);
  if (!policy.ok()) return policy.status();
  const auto begin = std::chrono::steady_clock::now();
  const SimReport report =
      Simulate(*traffic, server->options, server->ladder, server->costs, policy->get());
  const double wall =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  std::vector<double> first, per_token;
  for (const SimOutcome& call : report.calls) {
    if (call.refused) continue;
    first.push_back(call.first_token_s);
    if (call.tokens > 1) per_token.push_back(call.per_token_s);
  }
  const auto calls = static_cast<int>(report.calls.size());
  const int good = report.good(server->options), refused = report.refused();
  const double seconds = std::max(report.seconds, 1e-9);
  if (options.json) {
    nlohmann::ordered_json rungs;
    for (const int64_t tokens : report.rung_tokens) rungs.push_back(tokens);
    const nlohmann::ordered_json told = {{"calls", calls},
                                         {"refused", refused},
                                         {"good", good},
                                         {"seconds", report.seconds},
                                         {"goodput", good / seconds},
                                         {"told_loss", report.loss_per_token()},
                                         {"ttft_p50_s", Percentile(first, 50)},
                                         {"ttft_p95_s", Percentile(first, 95)},
                                         {"tpot_p50_s", Percentile(per_token, 50)},
                                         {"tpot_p95_s", Percentile(per_token, 95)},
                                         {"rung_tokens", rungs},
                                         {"steps", report.steps},
                                         {"rung_moves", report.rung_moves},
                                         {"preemptions", report.preemptions},
                                         {"wall_s", wall}};
    fmt::print("{}\n", told.dump(2));
    return absl::OkStatus();
  }
  fmt::print(
      "{} calls in {:.1f} s of virtual time, {} steps, simulated in {:.2f} s ({:.0f} calls a "
      "minute)\n",
      calls, report.seconds, report.steps, wall, 60 * calls / std::max(wall, 1e-9));
  fmt::print("good {} ({:.2f}/s), refused {}, told loss {:.3f} nats/token\n", good, good / seconds,
             refused, report.loss_per_token());
  fmt::print("first token p50 {:.3f} s, p95 {:.3f} s; per token p50 {:.1f} ms, p95 {:.1f} ms\n",
             Percentile(first, 50), Percentile(first, 95), 1e3 * Percentile(per_token, 50),
             1e3 * Percentile(per_token, 95));
  if (!options.scenario.empty()) PrintBatches(report);
  fmt::print("tokens by rung:");
  for (const int64_t tokens : report.rung_tokens) fmt::print(" {}", tokens);
  fmt::print("; {} moves, {} preemptions\n", report.rung_moves, report.preemptions);
  return absl::OkStatus();
}

}  // namespace

void AddSimulate(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "simulate",
      "Serve traffic in virtual time: the shipped scheduler and policy, steps as timed before");
  AddSimulatedServerOptions(*sub, &options->server);
  sub->add_option("--policy", options->policy, "off, fixed:RUNG, ladder or dqn")
      ->type_name("NAME")
      ->check(IsPolicy())
      ->capture_default_str();
  sub->add_option("--policy-file", options->policy_file,
                  "The dqn policy's network; default: beside the ladder, with .dqn")
      ->type_name("PATH");
  CLI::Option* traffic =
      sub->add_option(
             "--traffic", options->traffic,
             "Calls and memory from a file: lines call SECONDS PROMPT OUTPUT [PRIORITY] and "
             "memory SECONDS SHARE; in place of what the options below make up")
          ->type_name("PATH");
  CLI::Option* scenario =
      sub->add_option(
             "--scenario", options->scenario,
             "RAP's: a batch of so many sequences of so many tokens, in a KV pool that just "
             "holds it, then in 0.8 and in 0.6 of that; in place of calls and --kv-memory")
          ->type_name("NAME")
          ->check(CLI::IsMember(ScenarioNames()))
          ->excludes(traffic)
          ->excludes("--kv-memory");
  const auto made_up = [&](CLI::Option* option) {
    option->capture_default_str()->excludes(scenario)->excludes(traffic);
  };
  made_up(sub->add_option(
                 "--arrivals", options->arrivals,
                 "poisson; bursts: nine times as many for a quarter of each period; diurnal: a "
                 "sine")
              ->type_name("NAME")
              ->check(CLI::IsMember(
                  std::vector<std::string>(std::begin(kArrivalNames), std::end(kArrivalNames)))));
  const auto number = [&](const char* name, double& value, double least, double most,
                          const char* unit, const char* description) {
    made_up(sub->add_option(name, value, description)->type_name(unit)->check(Within(least, most)));
  };
  TrafficOptions& made = options->made;
  number("--rate", made.rate, 1e-3, 1e6, "CALLS/S", "Calls a second, mean");
  number("--duration", made.seconds, 1, 1e7, "SECONDS", "In which calls arrive");
  number("--period", made.period_s, 0.1, 1e6, "SECONDS", "Of bursts and diurnal arrivals");
  number("--prompt", made.prompt.median, 1, 1e5, "TOKENS", "Median length of prompts");
  number("--prompt-spread", made.prompt.spread, 0, 3, "NUMBER",
         "Standard deviation of its logarithm");
  number("--output", made.output.median, 1, 1e5, "TOKENS", "Median length of answers");
  number("--output-spread", made.output.spread, 0, 3, "NUMBER",
         "Standard deviation of its logarithm");
  number("--low-priority", made.low_priority, 0, 1, "SHARE", "Of calls of priority -1");
  number("--shock-every", made.shock_every_s, 0, 1e6, "SECONDS",
         "Mean time between memory being taken and given back; 0: never");
  number("--most-taken", made.most_taken, 0, 1, "SHARE", "Of the KV pool, at most");
  made_up(sub->add_option("--seed", made.seed, "Of the traffic")
              ->type_name("NUMBER")
              ->check(Unsigned64()));
  sub->add_flag("--json", options->json, "The report as JSON");
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
