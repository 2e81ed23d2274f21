// The rule policy, by scenarios as text and by reports that nobody would send.
//
// A scenario: `kv BYTES...` of the ladder's rungs, `load_loss NATS` in place of any, then
// `at SECONDS [SIGNAL=VALUE]... -> LEVEL [REASON [refuses]]`, of which signals not told are 0.
#include "policy/ladder_policy.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <sstream>
#include <string>

#include "gtest/gtest.h"

namespace espalier {
namespace {

Ladder LadderOf(std::istream& kv_bytes) {
  const SiteWidths widths{.layers = 1, .heads = 4, .channels = 100};
  Ladder ladder = Ladder::DenseOnly(widths);
  Rung rung = ladder.rung(0);
  kv_bytes >> rung.price.kv_bytes_per_token;
  ladder = Ladder::DenseOnly(widths, rung.price);
  while (kv_bytes >> rung.price.kv_bytes_per_token) {
    rung.decode.Keep(0, SiteKind::kChannels, rung.decode.kept(0, SiteKind::kChannels) - 10);
    rung.price.quality_loss_nats += 0.1;
    EXPECT_TRUE(ladder.Append(rung));
  }
  return ladder;
}

class Scenario : public testing::TestWithParam<std::string> {};

TEST_P(Scenario, GoesAsTold) {
  std::ifstream file(ESPALIER_SOURCE_DIR "/tests/policy/scenarios/" + GetParam() + ".txt");
  ASSERT_TRUE(file.is_open());
  const auto policy_of = [](double load_loss) {
    return LadderPolicy({.load_loss = load_loss, .raise_dwell_s = 0.2, .lower_dwell_s = 2});
  };
  LadderPolicy policy = policy_of(HUGE_VAL);
  Ladder ladder = Ladder::DenseOnly({});
  int reports = 0;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    SCOPED_TRACE(GetParam() + ".txt:" + std::to_string(number) + ": " + line);
    std::istringstream words(line);
    std::string word;
    words >> word;
    if (word == "kv") ladder = LadderOf(words);
    double load_loss = 0;
    if (word == "load_loss" && words >> load_loss) policy = policy_of(load_loss);
    if (word != "at") {
      ASSERT_TRUE(word.empty() || word[0] == '#' || word == "kv" || word == "load_loss");
      continue;
    }
    PressureReport report;
    std::map<std::string, double*> signals = {{"kv", &report.kv_used},
                                              {"promised", &report.kv_promised},
                                              {"wait", &report.oldest_wait_s},
                                              {"step", &report.step_s}};
    words >> report.time_s;
    while (words >> word && word != "->") {
      const size_t equals = word.find('=');
      ASSERT_TRUE(signals.contains(word.substr(0, equals)));
      *signals[word.substr(0, equals)] = std::strtod(word.c_str() + equals + 1, nullptr);
    }
    int level = -1;
    ASSERT_TRUE(words >> level);
    policy.Observe(report, ladder);
    EXPECT_EQ(policy.level(), level);
    if (words >> word) {
      EXPECT_EQ(policy.reason(), word);
      const bool refuses = words >> word && word == "refuses";
      EXPECT_EQ(policy.refuses(), refuses);
    }
    ++reports;
  }
  EXPECT_GT(reports, 5);
}

INSTANTIATE_TEST_SUITE_P(Files, Scenario,
                         testing::Values("queue", "memory", "latency", "load_loss"),
                         [](const auto& info) { return info.param; });

TEST(LadderPolicy, PrunesLowPrioritiesFirst) {
  std::istringstream kv("1 1 1 1 1");
  const Ladder ladder = LadderOf(kv);
  LadderPolicy policy({.load_loss = HUGE_VAL});
  const auto choose = [&](int priority, RungSet allowed = 0b11111) {
    return policy.ChooseRung({.allowed = allowed, .priority = priority});
  };
  EXPECT_EQ(choose(-3), 0) << "nothing is short";
  policy.Observe({.time_s = 1, .oldest_wait_s = 9}, ladder);
  policy.Observe({.time_s = 2, .oldest_wait_s = 9}, ladder);
  EXPECT_EQ(policy.level(), 2);
  EXPECT_EQ(choose(0), 2);
  EXPECT_EQ(choose(1), 1);
  EXPECT_EQ(choose(7), 0);
  EXPECT_EQ(choose(-1), 3);
  EXPECT_EQ(choose(std::numeric_limits<int>::min()), 4);
  EXPECT_EQ(choose(std::numeric_limits<int>::max()), 0);
  EXPECT_EQ(choose(0, 0b00011), 1) << "the hardest milder one that is allowed";
  EXPECT_EQ(policy.wanted(), 2);
}

TEST(LadderPolicy, PrunesLowPrioritiesNoFurtherThanWhatPressesMayCost) {
  std::istringstream kv("2 2 2 1 1");
  const Ladder ladder = LadderOf(kv);
  LadderPolicy policy({.load_loss = 0.2});
  policy.Observe({.time_s = 1, .oldest_wait_s = 9}, ladder);
  EXPECT_EQ(policy.ChooseRung({.allowed = 0b11111}), 1);
  EXPECT_EQ(policy.ChooseRung({.allowed = 0b11111, .priority = -3}), 2);
  policy.Observe({.time_s = 2, .kv_used = 1.1}, ladder);
  EXPECT_EQ(policy.ChooseRung({.allowed = 0b11111}), 3);
  EXPECT_EQ(policy.ChooseRung({.allowed = 0b11111, .priority = -3}), 4);
}

TEST(LadderPolicy, IsNotMovedBeyondTheLadderOrBoundsByGarbage) {
  std::mt19937_64 random(11);
  const double odd[] = {0,        1,         -1,  1e300, -1e300, std::nan(""),
                        HUGE_VAL, -HUGE_VAL, 0.5, 0.96,  1.01,   1e-300};
  bool quiet = false;
  const auto draw = [&] {
    if (quiet) return 0.01;
    return random() % 3 == 0 ? odd[random() % std::size(odd)]
                             : static_cast<double>(random() % 2000) / 1000;
  };
  std::istringstream kv("5 5 4 4 3 3");
  const Ladder ladder = LadderOf(kv);
  LadderPolicy policy({.lower_dwell_s = 0.1});
  int moves = 0, silent = 0;
  for (int i = 0; i < 200'000; ++i) {
    quiet = i / 40 % 2 == 0;
    const int before = policy.level();
    silent = random() % 20 == 0 ? silent + 1 : 0;
    const PressureReport report{.time_s = silent > 0 ? std::nan("") : 0.05 * i,
                                .kv_used = draw(),
                                .kv_promised = draw(),
                                .queue_length = draw(),
                                .oldest_wait_s = draw(),
                                .step_s = draw()};
    policy.Observe(report, ladder);
    if (policy.level() > before && !(report.kv_used > 1)) {
      ASSERT_LE(policy.level(), ladder.HardestWithin(0.2)) << "load may not cost that";
    }
    moves += policy.level() != before ? 1 : 0;
    ASSERT_GE(policy.level(), 0);
    ASSERT_LT(policy.level(), ladder.size());
    if (silent > 0) {
      ASSERT_EQ(policy.level(), before);
    }
    const RungSet allowed = (random() & 0b111111) | 1;
    const int rung =
        policy.ChooseRung({.allowed = allowed, .priority = static_cast<int>(random() % 5) - 2});
    ASSERT_TRUE(Has(allowed, rung)) << rung << " of " << allowed;
  }
  EXPECT_GT(moves, 1000);
}

TEST(LadderPolicy, RefusesLastOfAll) {
  std::istringstream kv("1 1 1");
  const Ladder ladder = LadderOf(kv);
  LadderPolicy policy({});  // 0.2 nats for rung 2, which load may cost
  const auto observe = [&](double time, double wait) {
    policy.Observe({.time_s = time, .oldest_wait_s = wait}, ladder);
    return policy.refuses();
  };
  EXPECT_FALSE(observe(1, 0.9)) << "rung 1 is left";
  EXPECT_TRUE(observe(2, 0.9));
  EXPECT_FALSE(observe(3, 0.2));
  EXPECT_EQ(policy.level(), 2);
  EXPECT_TRUE(observe(4, 0.3));
}

TEST(ShadowPolicy, ServesTheFullModelAndSaysWhatItWouldDo) {
  std::istringstream kv("1 1 1");
  const Ladder ladder = LadderOf(kv);
  LadderPolicy rule({});
  ShadowPolicy shadow(&rule);
  shadow.Observe({.time_s = 1, .oldest_wait_s = 9}, ladder);
  EXPECT_EQ(shadow.ChooseRung({.allowed = 0b111}), 0);
  EXPECT_EQ(shadow.wanted(), 1);
  EXPECT_EQ(shadow.reason(), "queue");
}

}  // namespace
}  // namespace espalier
