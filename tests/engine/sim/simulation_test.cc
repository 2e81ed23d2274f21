#include "engine/sim/simulation.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "policy/ladder_policy.h"

namespace espalier {
namespace {

constexpr int kLayers = 4;

// Rung 1 is twice as fast; rung 2 four times, and keeps the KV of half of the layers.
Ladder Three() {
  const SiteWidths widths{.layers = kLayers, .heads = 4, .channels = 64};
  Ladder ladder = Ladder::DenseOnly(widths, {.kv_bytes_per_token = 4});
  KeepProfile keep = KeepProfile::Dense(widths);
  keep.Keep(3, SiteKind::kChannels, 32);
  EXPECT_TRUE(ladder.Append({keep, keep, {.kv_bytes_per_token = 4, .quality_loss_nats = 0.1}}));
  for (const int layer : {0, 1}) keep.Keep(layer, SiteKind::kHeads, 0);
  EXPECT_TRUE(ladder.Append({keep, keep, {.kv_bytes_per_token = 2, .quality_loss_nats = 0.4}}));
  return ladder;
}

const CostModel kCosts{.rungs = {{.fixed = 10e-3, .decode = 2e-3, .prefill = 1e-3},
                                 {.fixed = 5e-3, .decode = 1e-3, .prefill = 5e-4},
                                 {.fixed = 2e-3, .decode = 5e-4, .prefill = 2.5e-4}}};

SimOptions Options() {
  return {.scheduler = {.max_batch_tokens = 256, .max_sequences = 8, .prefix_cache = false},
          .geometry = {.layers = kLayers, .pages = kLayers * 200, .context = 2048},
          .ttft_target_s = 1,
          .tpot_target_s = 0.05};
}

Traffic Calls(double rate, double seconds = 60) {
  return MakeTraffic({.rate = rate,
                      .seconds = seconds,
                      .prompt = {.median = 64, .spread = 0.3},
                      .output = {.median = 32, .spread = 0.3}});
}

TEST(Simulation, ACallTakesWhatItsStepsCost) {
  Traffic traffic;
  traffic.calls = {{.arrival = std::chrono::seconds(3), .prompt = 100, .output = 11}};
  FixedPolicy policy(1);
  const SimReport report = Simulate(traffic, Options(), Three(), kCosts, &policy);
  ASSERT_EQ(report.calls.size(), 1U);
  EXPECT_NEAR(report.calls[0].first_token_s, 5e-3 + 100 * 5e-4, 1e-6);
  EXPECT_NEAR(report.calls[0].per_token_s, 5e-3 + 1e-3, 1e-6);
  EXPECT_EQ(report.calls[0].tokens, 11);
  EXPECT_DOUBLE_EQ(report.calls[0].loss, 0.1);
  EXPECT_EQ(report.steps, 11);
  EXPECT_EQ(report.rung_tokens, (std::vector<int64_t>{0, 11, 0}));
  EXPECT_NEAR(report.seconds, 3 + 0.055 + 10 * 0.006, 1e-6);
}

TEST(Simulation, SameTrafficSameOutcome) {
  LadderPolicy first({}), again({});
  const SimReport a = Simulate(Calls(20), Options(), Three(), kCosts, &first);
  const SimReport b = Simulate(Calls(20), Options(), Three(), kCosts, &again);
  EXPECT_EQ(a.steps, b.steps);
  EXPECT_EQ(a.rung_tokens, b.rung_tokens);
  EXPECT_EQ(a.seconds, b.seconds);
  for (size_t i = 0; i < a.calls.size(); ++i) {
    ASSERT_EQ(a.calls[i].first_token_s, b.calls[i].first_token_s) << i;
    ASSERT_EQ(a.calls[i].loss, b.calls[i].loss) << i;
  }
}

TEST(Simulation, EachCallEndsOnce) {
  Traffic traffic = Calls(30);
  traffic.shocks = {{std::chrono::seconds(10), 0.2}, {std::chrono::seconds(30), 1}};
  LadderPolicy policy({});
  int told = 0, refused = 0;
  const SimReport report =
      Simulate(traffic, Options(), Three(), kCosts, &policy, [&](const SimOutcome& outcome) {
        ++told;
        refused += outcome.refused;
      });
  EXPECT_EQ(told, traffic.calls.size());
  EXPECT_EQ(refused, report.refused());
  for (size_t i = 0; i < traffic.calls.size(); ++i) {
    EXPECT_EQ(report.calls[i].tokens, report.calls[i].refused ? 0 : traffic.calls[i].output) << i;
  }
}

TEST(Simulation, UnderPressureThePolicyServesMoreThanTheFullModel) {
  const Traffic traffic = Calls(12);
  FixedPolicy full(0);
  LadderPolicy ladder({.ttft_target_s = 1, .tpot_target_s = 0.05});
  const SimReport dense = Simulate(traffic, Options(), Three(), kCosts, &full);
  const SimReport pruned = Simulate(traffic, Options(), Three(), kCosts, &ladder);
  EXPECT_GT(pruned.good(Options()), 2 * dense.good(Options()));
  EXPECT_EQ(dense.loss_per_token(), 0);
  EXPECT_GT(pruned.loss_per_token(), 0);
}

TEST(Simulation, WithoutPressureItIsTheFullModel) {
  // A step that prefills a long prompt takes 0.15 s: that must not count as pressure.
  LadderPolicy ladder({.ttft_target_s = 1, .tpot_target_s = 0.2});
  const SimReport report = Simulate(Calls(1), Options(), Three(), kCosts, &ladder);
  EXPECT_EQ(report.refused(), 0);
  EXPECT_EQ(report.loss_per_token(), 0);
}

TEST(Simulation, WhoComesToAnIdleServerIsNotRefusedForThoseBefore) {
  class Refuses final : public Policy {
   public:
    int ChooseRung(const RequestTraits& /*traits*/) const override { return 0; }
    std::string_view name() const override { return "refuses"; }
    double refuses_behind_s() const override { return 0; }
  };
  Traffic traffic;
  // One runs at a time. The last but one waits, for which the last is refused.
  for (const int at_ms : {0, 100'000, 100'000, 200'000, 200'001, 200'100}) {
    traffic.calls.push_back(
        {.arrival = std::chrono::milliseconds(at_ms), .prompt = 8, .output = 200});
  }
  Refuses policy;
  SimOptions options = Options();
  options.scheduler.max_sequences = 1;
  const SimReport report = Simulate(traffic, options, Three(), kCosts, &policy);
  std::vector<bool> refused;
  for (const SimOutcome& call : report.calls) refused.push_back(call.refused);
  EXPECT_EQ(refused, (std::vector<bool>{false, false, false, false, false, true}));
}

TEST(Simulation, RapsScenariosAreServedInLessMemory) {
  for (const BlockTask& scenario : RapScenarios()) {
    SimOptions options = Options();
    options.scheduler.max_sequences = scenario.batch;
    options.geometry.context = 1 << 20;
    options.geometry.pages =
        kLayers * scenario.batch * (scenario.length / options.geometry.page_tokens + 1);
    const Traffic traffic = RapTraffic(scenario, 1e6);
    FixedPolicy full(0), half(2);  // rung 2 keeps half of the KV
    const SimReport dense = Simulate(traffic, options, Three(), kCosts, &full);
    const SimReport pruned = Simulate(traffic, options, Three(), kCosts, &half);
    // Three budgets, all of the memory first. Who does not fit as a whole is refused.
    for (int i = 0; i < 3 * scenario.batch; ++i) {
      EXPECT_EQ(dense.calls[i].refused, scenario.batch == 1 && i > 0) << scenario.batch;
      EXPECT_FALSE(pruned.calls[i].refused) << scenario.batch;
    }
    if (scenario.batch == 1) continue;
    const auto last_first_token = [&](const SimReport& report, int budget) {
      double last = 0;
      for (int i = 0; i < scenario.batch; ++i) {
        last = std::max(last, report.calls[budget * scenario.batch + i].first_token_s);
      }
      return last;
    };
    // In 0.6 of the memory some calls of the full model wait until others end.
    EXPECT_EQ(last_first_token(pruned, 0), last_first_token(pruned, 2)) << scenario.batch;
    EXPECT_GT(last_first_token(dense, 2), 1.2 * last_first_token(dense, 0)) << scenario.batch;
  }
}

TEST(Simulation, LessMemoryIsFelt) {
  Traffic traffic = Calls(4);
  FixedPolicy policy(0);
  const SimReport roomy = Simulate(traffic, Options(), Three(), kCosts, &policy);
  traffic.shocks = {{Instant(0), 0.05}};
  const SimReport tight = Simulate(traffic, Options(), Three(), kCosts, &policy);
  EXPECT_GT(tight.seconds, roomy.seconds);
  EXPECT_LT(tight.good(Options()), roomy.good(Options()));
}

}  // namespace
}  // namespace espalier
