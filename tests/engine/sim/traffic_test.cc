#include "engine/sim/traffic.h"

#include <cmath>
#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace espalier {
namespace {

TrafficOptions Options(Arrivals arrivals) {
  return {.arrivals = arrivals,
          .rate = 50,
          .seconds = 400,
          .prompt = {.median = 100, .spread = 0.5},
          .output = {.median = 40},
          .low_priority = 0.25};
}

TEST(Traffic, HasTheRateAskedFor) {
  for (const Arrivals arrivals : {Arrivals::kPoisson, Arrivals::kBursts, Arrivals::kDiurnal}) {
    const auto calls = static_cast<double>(MakeTraffic(Options(arrivals)).calls.size());
    EXPECT_NEAR(calls, 50 * 400, 4 * std::sqrt(50 * 400)) << static_cast<int>(arrivals);
  }
}

TEST(Traffic, BurstsAreNineTimesTheirQuietTimes) {
  const Traffic traffic = MakeTraffic(Options(Arrivals::kBursts));
  double burst = 0, quiet = 0;
  for (const SimCall& call : traffic.calls) {
    const double at = std::chrono::duration<double>(call.arrival).count();
    (std::fmod(at, 20) < 5 ? burst : quiet) += 1;
  }
  EXPECT_NEAR(3 * burst / quiet, 9, 0.5);
}

TEST(Traffic, HasTheLengthsAndPrioritiesAskedFor) {
  const Traffic traffic = MakeTraffic(Options(Arrivals::kPoisson));
  double shorter = 0, low = 0, logs = 0;
  for (const SimCall& call : traffic.calls) {
    ASSERT_GE(call.prompt, 1);
    EXPECT_EQ(call.output, 40);
    shorter += call.prompt < 100;
    low += call.priority == -1;
    logs += std::pow(std::log(call.prompt / 100.0), 2);
  }
  const auto calls = static_cast<double>(traffic.calls.size());
  EXPECT_NEAR(shorter / calls, 0.5, 0.02);
  EXPECT_NEAR(low / calls, 0.25, 0.02);
  EXPECT_NEAR(std::sqrt(logs / calls), 0.5, 0.02);
}

TEST(Traffic, TakesMemoryAndGivesItBack) {
  TrafficOptions options = Options(Arrivals::kPoisson);
  options.shock_every_s = 5;
  options.most_taken = 0.6;
  const Traffic traffic = MakeTraffic(options);
  ASSERT_GT(traffic.shocks.size(), 40U);
  for (size_t i = 0; i < traffic.shocks.size(); ++i) {
    if (i % 2 == 0) {
      EXPECT_GE(traffic.shocks[i].share, 0.4);
    } else {
      EXPECT_EQ(traffic.shocks[i].share, 1);
    }
  }
}

TEST(Traffic, SameSeedSameTraffic) {
  TrafficOptions options = Options(Arrivals::kDiurnal);
  const Traffic first = MakeTraffic(options), again = MakeTraffic(options);
  EXPECT_EQ(first.calls, again.calls);
  options.seed = 2;
  EXPECT_NE(first.calls, MakeTraffic(options).calls);
}

TEST(Traffic, HasRapsTenScenariosAtTheirBudgets) {
  ASSERT_EQ(RapScenarios().size(), 10U);
  for (const BlockTask& scenario : RapScenarios()) {
    const Traffic traffic = RapTraffic(scenario, 100);
    ASSERT_EQ(traffic.shocks.size(), 3U);
    EXPECT_EQ(traffic.shocks[1], (MemoryShock{std::chrono::seconds(100), 0.8}));
    EXPECT_EQ(traffic.shocks[2], (MemoryShock{std::chrono::seconds(200), 0.6}));
    int64_t tokens = 0;
    for (const SimCall& call : traffic.calls) tokens += call.prompt + call.output;
    EXPECT_EQ(tokens, 3 * scenario.tokens());
    EXPECT_EQ(traffic.calls.size(), 3U * scenario.batch);
    EXPECT_EQ(traffic.calls.back().arrival, std::chrono::seconds(200));
  }
}

TEST(Traffic, IsReadFromText) {
  Traffic traffic;
  std::string error;
  ASSERT_TRUE(ParseTraffic("# two calls\ncall 2.5 10 20 -1\nmemory 1 0.5 # half\n\ncall 1 5 6\r\n",
                           &traffic, &error))
      << error;
  ASSERT_EQ(traffic.calls.size(), 2U);
  EXPECT_EQ(traffic.calls[0], (SimCall{std::chrono::seconds(1), 5, 6, 0}));
  EXPECT_EQ(traffic.calls[1], (SimCall{std::chrono::milliseconds(2500), 10, 20, -1}));
  ASSERT_EQ(traffic.shocks.size(), 1U);
  EXPECT_EQ(traffic.shocks[0], (MemoryShock{std::chrono::seconds(1), 0.5}));
}

TEST(Traffic, SaysTheLineAndWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"call", "line 1: expected call or memory, and seconds"},
      {"call -1 2 3", "line 1: expected call or memory, and seconds"},
      {"\ncall nan 2 3", "line 2: expected call or memory, and seconds"},
      {"call 1 0 3", "line 1: expected call SECONDS PROMPT OUTPUT [PRIORITY]"},
      {"call 1 2", "line 1: expected call SECONDS PROMPT OUTPUT [PRIORITY]"},
      {"call 1 2 3 4 5", "line 1: expected call SECONDS PROMPT OUTPUT [PRIORITY]"},
      {"call 1 2 99999999", "line 1: expected call SECONDS PROMPT OUTPUT [PRIORITY]"},
      {"memory 1 1.5", "line 1: expected memory SECONDS SHARE, a share of 0 to 1"},
      {"shock 1 0.5", "line 1: expected call SECONDS PROMPT OUTPUT [PRIORITY]"},
  };
  for (const auto& [text, expected] : cases) {
    Traffic traffic;
    std::string error;
    EXPECT_FALSE(ParseTraffic(text, &traffic, &error)) << text;
    EXPECT_EQ(error, expected) << text;
  }
}

}  // namespace
}  // namespace espalier
