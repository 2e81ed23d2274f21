#include "tools/train_serving.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "policy/serving_trainer.h"
#include "policy/shield.h"
#include "tools/figures.h"
#include "tools/interrupt.h"
#include "tools/progress.h"

namespace espalier {
namespace {

constexpr double kSeconds = 60;  // of arrivals, in a simulation
// Of what the full model can serve: far beyond it, too, or what is learned there is to let queue.
constexpr double kLeastRate = 0.2, kMostRate = 3;
constexpr int kHidden = 48;
constexpr double kLastEpsilon = 0.02, kExploring = 0.7;
// What is learned late is not always better: the best network of those tried now and then is kept.
constexpr int kTriedEvery = 50;  // episodes, on as many traces as are held out
// These are the same whatever the seed, so that networks of several can be compared.
constexpr uint64_t kValidation = 0x76616c6964617465, kHeldOut = 0x68656c646f7574;

double Uniform(std::mt19937_64* random, double least, double most) {
  return least + (most - least) * (static_cast<double>((*random)() >> 11) * 0x1p-53);
}

// Traffic of all kinds around what the full model can serve, and memory that comes and goes.
struct Trace {
  Traffic traffic;
  double rate = 0;  // calls a second, mean
  SimOptions options;
};

class Traces {
 public:
  Traces(const SimulatedServer& server, uint64_t seed) : server_(server), random_(seed) {}

  Trace Next() {
    const std::span<const std::string_view> kinds(kArrivalNames);
    TrafficOptions traffic{.arrivals = static_cast<Arrivals>(random_() % kinds.size()),
                           .seconds = kSeconds,
                           .period_s = Uniform(&random_, 8, 40),
                           .prompt = {.median = std::exp2(Uniform(&random_, 5, 8)),
                                      .spread = Uniform(&random_, 0, 0.8)},
                           .output = {.median = std::exp2(Uniform(&random_, 4, 7.5)),
                                      .spread = Uniform(&random_, 0, 0.8)}};
    if (random_() % 2 == 0) traffic.shock_every_s = Uniform(&random_, 5, 30);
    traffic.low_priority = random_() % 4 == 0 ? 0.3 : 0;
    traffic.prompt.most = traffic.output.most = 512;
    traffic.seed = random_();
    // What a full batch takes for a call at rung 0, with prompts prefilled in between.
    const RungCost& cost = server_.costs.rungs.front();
    const int batch = server_.options.scheduler.max_sequences;
    const double call = traffic.prompt.median * cost.prefill +
                        traffic.output.median * (cost.decode + cost.fixed / batch);
    traffic.rate = Uniform(&random_, kLeastRate, kMostRate) / call;
    Trace trace{.traffic = MakeTraffic(traffic), .rate = traffic.rate, .options = server_.options};
    trace.options.geometry.pages =
        static_cast<int>(trace.options.geometry.pages * Uniform(&random_, 0.5, 1));
    return trace;
  }

 private:
  const SimulatedServer& server_;
  std::mt19937_64 random_;
};

// Of a call, in good calls.
double Worth(const SimOutcome& call, const SimOptions& options,
             const TrainServingOptions& weights) {
  if (call.refused) return -weights.refusal_cost;
  return (call.Good(options) ? 1 : 0) - weights.loss_weight * call.loss;
}

// A policy on all held-out traces.
struct Judged {
  std::string name;
  std::string key;            // of figures
  std::vector<double> worth;  // [traces], a call's mean
  double calls = 0, good = 0, refused = 0, tokens = 0, loss = 0;
};

using MakePolicy = std::function<std::unique_ptr<Policy>()>;

Judged Judge(std::string name, std::string key, const MakePolicy& make,
             std::span<const Trace> traces, const SimulatedServer& server,
             const TrainServingOptions& weights) {
  Judged judged{.name = std::move(name), .key = std::move(key)};
  for (const Trace& trace : traces) {
    const std::unique_ptr<Policy> policy = make();
    const SimReport report =
        Simulate(trace.traffic, trace.options, server.ladder, server.costs, policy.get());
    double worth = 0;
    for (const SimOutcome& call : report.calls) {
      worth += Worth(call, trace.options, weights);
      judged.tokens += call.tokens;
      judged.loss += call.loss * call.tokens;
    }
    const auto calls = static_cast<double>(report.calls.size());
    judged.worth.push_back(worth / std::max(1.0, calls));
    judged.calls += calls;
    judged.good += report.good(trace.options);
    judged.refused += report.refused();
  }
  return judged;
}

double Mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace

absl::Status TrainServing(const TrainServingOptions& options) {
  const Interrupt interrupt([] {});
  const absl::StatusOr<SimulatedServer> server = MakeSimulatedServer(options.server);
  if (!server.ok()) return server.status();
  const std::filesystem::path folder = std::filesystem::absolute(options.out).parent_path();
  if (!std::filesystem::is_directory(folder)) {  // rather than when all is learned
    return absl::NotFoundError(
        fmt::format("{}: there is no folder {}", options.out, folder.string()));
  }
  const int rungs = server->ladder.size();
  const LevelPolicyOptions level = LevelOf(options.server);
  const LadderPolicyOptions rule = RuleOf(options.server);
  DoubleDqn dqn({.inputs = kLevelInputs, .hidden = kHidden, .actions = rungs},
                {.gamma = 0.97F,
                 .learning_rate = 1e-4F,
                 .replay = 200'000,
                 .target_every = 1000,
                 .seed = options.seed});
  Traces training(*server, options.seed), validating(*server, kValidation);
  std::vector<Trace> validation;
  for (int i = 0; i < options.traces; ++i) validation.push_back(validating.Next());
  std::unique_ptr<DqnPolicy> learned;
  const auto shielded = [&](const QNetwork& network) {
    learned = std::make_unique<DqnPolicy>(level, &network);
    return std::make_unique<Shield>(learned.get(), rule);
  };
  QNetwork network = dqn.network();
  const double rules = Mean(Judge(
                                "", "", [&] { return std::make_unique<LadderPolicy>(rule); },
                                validation, *server, options)
                                .worth);
  double best = -1e9;
  int best_episode = 0;
  {
    Progress bar("the policy's episodes");
    for (int episode = 0; episode < options.episodes; ++episode) {
      const Trace trace = training.Next();
      const double explored = episode / (kExploring * options.episodes);
      ServingTrainer trainer(level, std::max(kLastEpsilon, 1 - explored), &dqn);
      Shield shield(&trainer, rule);
      Simulate(
          trace.traffic, trace.options, server->ladder, server->costs, &shield,
          // A share of a second's calls: where few come, each counts for more, as it is judged.
          [&](const SimOutcome& call) {
            trainer.Reward(Worth(call, trace.options, options) / trace.rate);
          });
      trainer.End();
      if ((episode + 1) % kTriedEvery == 0 || episode + 1 == options.episodes) {
        const QNetwork tried = dqn.network();
        const double worth = Mean(
            Judge("", "", [&] { return shielded(tried); }, validation, *server, options).worth);
        if (worth > best) {
          best = worth;
          best_episode = episode + 1;
          network = tried;
        }
      }
      bar.Update(episode + 1, options.episodes);
      if (Interrupt::raised()) return absl::CancelledError("interrupted; nothing was written");
    }
  }

  Traces held_out(*server, kHeldOut);
  std::vector<Trace> traces;
  for (int i = 0; i < options.traces; ++i) traces.push_back(held_out.Next());
  std::vector<Judged> judged;
  const auto judge = [&](std::string name, std::string key, const MakePolicy& make) {
    judged.push_back(Judge(std::move(name), std::move(key), make, traces, *server, options));
  };
  judge("ladder, the rule", "ladder", [&] { return std::make_unique<LadderPolicy>(rule); });
  judge("dqn, in the shield", "dqn", [&] { return shielded(network); });
  for (int rung = 0; rung < rungs; ++rung) {
    judge(fmt::format("fixed:{}", rung), fmt::format("fixed_{}", rung),
          [&] { return std::make_unique<FixedPolicy>(rung); });
  }
  std::vector<double> differences;
  for (int i = 0; i < options.traces; ++i) {
    differences.push_back(judged[1].worth[i] - judged[0].worth[i]);
  }
  const double mean = Mean(differences);
  double squares = 0;
  for (const double difference : differences) squares += (difference - mean) * (difference - mean);
  const double error = std::sqrt(squares / std::max(1, options.traces - 1) / options.traces);

  nlohmann::ordered_json figures;
  std::string table =
      fmt::format("{} held-out traces of {:.0f} s\n{:20}{:>8}{:>8}{:>10}{:>12}\n", options.traces,
                  kSeconds, "", "worth", "good", "refused", "told loss");
  for (const Judged& policy : judged) {
    table += fmt::format("{:20}{:8.3f}{:7.1f}%{:9.1f}%{:12.3f}\n", policy.name, Mean(policy.worth),
                         100 * policy.good / policy.calls, 100 * policy.refused / policy.calls,
                         policy.loss / std::max(1.0, policy.tokens));
    figures["serve_worth_" + policy.key] = Mean(policy.worth);
    figures["serve_good_" + policy.key] = policy.good / policy.calls;
    figures["serve_loss_" + policy.key] = policy.loss / std::max(1.0, policy.tokens);
  }
  table += fmt::format(
      "worth: of a call, 1 if within its targets, less {} a nat told, {} if "
      "refused\nthe network of episode {}, the best on {} other traces: {:+.4f} there; dqn less "
      "ladder, trace by trace: {:+.4f} +- {:.4f}\n",
      options.loss_weight, -options.refusal_cost, best_episode, options.traces, best - rules, mean,
      error);
  fmt::print("{}", table);
  figures["dqn_vs_ladder"] = Mean(judged[1].worth) / Mean(judged[0].worth);

  std::ofstream file(options.out, std::ios::binary);
  file << network.Format(
      {.load_loss = rule.load_loss,
       .ttft_target_s = rule.ttft_target_s,
       .tpot_target_s = rule.tpot_target_s,
       .how = fmt::format("{} episodes, seed {}, loss-weight {}, refusal-cost {}", options.episodes,
                          options.seed, options.loss_weight, options.refusal_cost)});
  file.close();
  if (!file) return absl::UnavailableError(fmt::format("{}: cannot be written", options.out));
  fmt::print("{}\n", options.out);
  return options.figures.empty() ? absl::OkStatus()
                                 : WriteFigures(options.figures, std::move(figures));
}

}  // namespace espalier
