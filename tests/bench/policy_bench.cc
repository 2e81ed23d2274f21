// What a decision costs, as a server makes it: a report observed, one request's rung chosen, and
// both told to the log, for each policy. `make bench-squeeze` keeps the worst p99 as policy_p99_us.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "server/decision_log.h"
#include "tools/figures.h"
#include "tools/statistics.h"

namespace espalier {
namespace {

constexpr int kRungs = 12, kDecisions = 300'000;

Ladder Twelve() {
  const SiteWidths widths{.layers = 32, .heads = 32, .channels = 11008};
  Ladder ladder = Ladder::DenseOnly(widths, {.kv_bytes_per_token = 100});
  KeepProfile keep = KeepProfile::Dense(widths);
  for (int rung = 1; rung < kRungs; ++rung) {
    keep.Keep(rung, SiteKind::kHeads, 0);
    ladder.Append(
        {keep, keep, {.kv_bytes_per_token = 100.0 - rung, .quality_loss_nats = 0.1 * rung}});
  }
  return ladder;
}

struct Cost {
  double p50_us = 0, p99_us = 0;
};

Cost Measure(Policy* policy, const Ladder& ladder) {
  using Clock = std::chrono::steady_clock;
  std::mt19937_64 random(1);
  const auto uniform = [&] { return static_cast<double>(random() >> 11) * 0x1p-53; };
  std::vector<double> taken;
  taken.reserve(kDecisions);
  int64_t chosen = 0;
  for (int i = 0; i < kDecisions; ++i) {
    // As far apart as a learned policy decides, so that it does each time.
    const PressureReport report{.time_s = LevelPolicyOptions{}.every_s * i,
                                .kv_used = 1.1 * uniform(),
                                .kv_promised = uniform(),
                                .queue_length = uniform(),
                                .oldest_wait_s = 2 * uniform(),
                                .step_s = 0.2 * uniform(),
                                .running = static_cast<int>(random() % 64),
                                .waiting = static_cast<int>(random() % 256)};
    const RequestTraits traits{.allowed = 1 | random(), .priority = static_cast<int>(random() % 3)};
    const Clock::time_point begin = Clock::now();
    policy->Observe(report, ladder);
    const int rung = policy->ChooseRung(traits);
    policy->Chose(static_cast<uint64_t>(i), traits, rung);
    chosen += rung;
    taken.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  if (chosen < 0) return {};  // so that the choice is made
  return {Percentile(taken, 50), Percentile(taken, 99)};
}

int Main() {
  const Ladder ladder = Twelve();
  std::mt19937_64 random(2);
  const QNetwork network({.inputs = kLevelInputs, .hidden = 48, .actions = kRungs}, &random);
  LadderPolicy rule({});
  DqnPolicy learned({}, &network);
  Shield shield(&learned, {});
  const auto log = DecisionLog::Create("", {});
  LoggedPolicy logged_rule(&rule, log->get()), logged_shield(&shield, log->get());
  const Cost costs[] = {Measure(&logged_rule, ladder), Measure(&logged_shield, ladder)};
  fmt::print("a decision, microseconds{:>10}{:>10}\n", "p50", "p99");
  fmt::print("{:24}{:10.3f}{:10.3f}\n", "ladder", costs[0].p50_us, costs[0].p99_us);
  fmt::print("{:24}{:10.3f}{:10.3f}\n", "dqn, in the shield", costs[1].p50_us, costs[1].p99_us);
  const absl::Status status =
      WriteFigures(ESPALIER_FIGURES "/bench-policy.json",
                   {{"policy_ladder_p99_us", costs[0].p99_us},
                    {"policy_dqn_p99_us", costs[1].p99_us},
                    {"policy_p99_us", std::max(costs[0].p99_us, costs[1].p99_us)}});
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace espalier

int main() { return espalier::Main(); }
