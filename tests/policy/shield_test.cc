#include "policy/shield.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "gtest/gtest.h"
#include "policy/level_policy.h"

namespace espalier {
namespace {

constexpr int kRungs = 5;

Ladder Five() {
  const SiteWidths widths{.layers = 8, .heads = 2, .channels = 64};
  Ladder ladder = Ladder::DenseOnly(widths, {.kv_bytes_per_token = 8});
  KeepProfile keep = KeepProfile::Dense(widths);
  for (int rung = 1; rung < kRungs; ++rung) {
    keep.Keep(rung, SiteKind::kHeads, 0);
    EXPECT_TRUE(ladder.Append(
        {keep, keep, {.kv_bytes_per_token = 8.0 - rung, .quality_loss_nats = 0.1 * rung}}));
  }
  return ladder;
}

// Wants what it is told to.
class Told final : public Policy {
 public:
  void Observe(const PressureReport& /*report*/, const Ladder& /*ladder*/) override { ++seen; }
  int ChooseRung(const RequestTraits& /*traits*/) const override { return level; }
  std::string_view name() const override { return "told"; }
  std::string_view reason() const override { return "told"; }
  int level = 0;
  int seen = 0;
};

class ShieldTest : public testing::Test {
 protected:
  // Not calm, where nothing is said of it.
  void At(double time_s, int level,
          PressureReport report = {.oldest_wait_s = 0.2, .running = 1, .waiting = 1}) {
    told_.level = level;
    report.time_s = time_s;
    shield_.Observe(report, ladder_);
  }

  const Ladder ladder_ = Five();
  Told told_;
  Shield shield_{&told_, {.load_loss = 9, .lower_dwell_s = 0.25}};
};

TEST_F(ShieldTest, IsTheRulesBusinessWhereMemoryWasSeenLongAgo) {
  At(1, 3, {.oldest_wait_s = 0.2, .memory_age_s = 5, .running = 1, .waiting = 1});
  EXPECT_EQ(shield_.wanted(), 3);
  At(1.3, 4, {.memory_age_s = 5.1, .running = 1, .waiting = 1});
  EXPECT_EQ(shield_.wanted(), 2) << "the rule's 0, a rung a dwell";
  EXPECT_EQ(told_.seen, 1);
  At(1.6, 4, {.memory_age_s = std::nan(""), .running = 1, .waiting = 1});
  EXPECT_EQ(shield_.wanted(), 1);
  At(2, 4, {.oldest_wait_s = 0.2, .memory_age_s = 0.2, .running = 1, .waiting = 1});
  EXPECT_EQ(shield_.wanted(), 4);
}

TEST_F(ShieldTest, FollowsUpAtOnceAndDownByARungADwell) {
  At(1, 4);
  EXPECT_EQ(shield_.wanted(), 4);
  EXPECT_EQ(shield_.reason(), "told");
  At(1.1, 0);
  EXPECT_EQ(shield_.wanted(), 4);
  At(1.25, 0);
  EXPECT_EQ(shield_.wanted(), 3);
  for (const double time : {1.35, 1.45, 1.55}) At(time, 0);
  EXPECT_EQ(shield_.wanted(), 2);
  At(1.85, 0);
  At(2.15, 0);
  EXPECT_EQ(shield_.wanted(), 0);
  EXPECT_EQ(shield_.reason(), "none");
}

TEST_F(ShieldTest, DwellsWithoutAReportAllCount) {
  At(1, 4);
  At(1.6, 0, {.waiting = 1});
  EXPECT_EQ(shield_.wanted(), 2);
  At(1.7, 4);
  At(60, 0, {.waiting = 1});
  EXPECT_EQ(shield_.wanted(), 0) << "the first request after a pause";
  At(61, 4);
  At(1e300, 2);
  EXPECT_EQ(shield_.wanted(), 2) << "and no lower than is wanted";
}

TEST_F(ShieldTest, GoesByTheRuleWhereTheReportSaysNothing) {
  At(1, 3);
  const int seen = told_.seen;
  At(1.3, 3, {.kv_used = std::numeric_limits<double>::quiet_NaN()});
  EXPECT_EQ(told_.seen, seen);
  EXPECT_EQ(shield_.wanted(), 2);  // towards the rule's, which is 0
  At(1.2, 4);                      // older than the last
  EXPECT_EQ(told_.seen, seen);
  EXPECT_EQ(shield_.wanted(), 2);
  At(std::numeric_limits<double>::infinity(), 4);
  EXPECT_EQ(shield_.wanted(), 2);
}

TEST_F(ShieldTest, GoesByTheRuleWhereThereIsNoSuchRung) {
  for (const int level : {-1, kRungs, 1000}) {
    At(1, level);
    EXPECT_EQ(shield_.wanted(), 0);
  }
}

TEST_F(ShieldTest, MemoryIsNotThePolicysToIgnore) {
  At(1, 0, {.kv_used = 1.2});
  EXPECT_EQ(shield_.wanted(), 1);
  EXPECT_EQ(shield_.reason(), "memory");
  At(1.01, 0, {.kv_used = 1.2});
  EXPECT_EQ(shield_.wanted(), 2);
}

TEST_F(ShieldTest, LoadMayCostOnlySoMuch) {
  Shield shield(&told_, {.load_loss = 0.2, .lower_dwell_s = 0.25});
  told_.level = 4;
  shield.Observe({.time_s = 1, .oldest_wait_s = 0.9, .waiting = 1}, ladder_);
  EXPECT_EQ(shield.wanted(), 2);
  EXPECT_EQ(shield.ChooseRung({.allowed = 31, .priority = -2}), 2);
  EXPECT_TRUE(shield.refuses());
  for (const double time : {2.0, 2.1, 2.2, 2.3}) {
    shield.Observe({.time_s = time, .kv_used = 1.2, .oldest_wait_s = 0.9, .waiting = 1}, ladder_);
  }
  EXPECT_EQ(shield.wanted(), 4) << "memory may cost more";
  EXPECT_TRUE(shield.refuses());
  for (int i = 0; i < 20; ++i) {
    shield.Observe({.time_s = 3 + 0.3 * i, .kv_used = 0.8, .oldest_wait_s = 0.2, .waiting = 1},
                   ladder_);
  }
  EXPECT_EQ(shield.wanted(), 2);
}

TEST_F(ShieldTest, APolicyThatStaysMildCannotLetAQueueGrow) {
  Shield shield(&told_, {.load_loss = 0.2, .lower_dwell_s = 0.25});
  told_.level = 1;
  const auto at = [&](double time_s, double wait_s) {
    shield.Observe({.time_s = time_s, .oldest_wait_s = wait_s, .waiting = 40}, ladder_);
  };
  at(1, 0.6);  // the rule rises, by a rung in 0.2 s
  at(1.1, 0.7);
  EXPECT_EQ(shield.wanted(), 1);
  EXPECT_FALSE(shield.refuses());
  at(1.3, 0.9);
  EXPECT_EQ(shield.wanted(), 2) << "as hard as load may be";
  EXPECT_EQ(shield.reason(), "queue");
  EXPECT_TRUE(shield.refuses());
  at(2, 0.2);  // the rule holds its level and takes newcomers
  EXPECT_FALSE(shield.refuses());
  EXPECT_EQ(shield.wanted(), 1);
  at(2.1, 0.6);
  EXPECT_TRUE(shield.refuses());
  EXPECT_EQ(shield.wanted(), 2);
}

TEST_F(ShieldTest, InCalmTheFullModelIsServed) {
  const PressureReport calm{
      .kv_used = 0.85, .oldest_wait_s = 0.05, .step_s = 0.07, .running = 5, .waiting = 1};
  At(1, 3, calm);
  EXPECT_EQ(shield_.wanted(), 0);
  PressureReport report = calm;
  report.kv_used = 0.95;
  At(2, 3, report);
  EXPECT_EQ(shield_.wanted(), 3);
  At(2.2, 3, report);
  At(2.4, 3, calm);
  EXPECT_EQ(shield_.wanted(), 3) << "low, but not for a dwell: no calm yet";
  At(2.46, 3, calm);  // and back by a rung a dwell
  EXPECT_EQ(shield_.wanted(), 2);
  At(2.6, 3, calm);
  EXPECT_EQ(shield_.wanted(), 2);
  At(2.75, 3, calm);
  EXPECT_EQ(shield_.wanted(), 1);
  report = calm;
  report.step_s = 0.08;
  At(4, 3, report);
  EXPECT_EQ(shield_.wanted(), 3);
  report = calm;
  report.oldest_wait_s = 0.15;
  At(5, 3, report);
  EXPECT_EQ(shield_.wanted(), 3);
}

TEST_F(ShieldTest, RefusesOnTheLastRungWhileOthersWait) {
  At(1, kRungs - 1, {.oldest_wait_s = 0.9});
  EXPECT_TRUE(shield_.refuses());
  At(1.1, kRungs - 1, {.oldest_wait_s = 0.1});
  EXPECT_FALSE(shield_.refuses());
  At(1.6, kRungs - 2, {.oldest_wait_s = 0.9});
  EXPECT_FALSE(shield_.refuses());
}

// Whatever is learned, and whatever load and memory do.
TEST_F(ShieldTest, RefusesWhereverTheRuleDoesAtItsLevelOrHarder) {
  std::mt19937_64 random(11);
  const auto uniform = [&](double most) {
    return most * (static_cast<double>(random() >> 11) * 0x1p-53);
  };
  int refused = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const LadderPolicyOptions options{.load_loss = uniform(0.5)};
    QNetwork network({.inputs = kLevelInputs, .hidden = 8, .actions = kRungs}, &random);
    DqnPolicy dqn({.load_loss = options.load_loss}, &network);
    Shield told(&told_, options), learned(&dqn, options);
    LadderPolicy rule(options);
    PressureReport report;
    double wait_s = 0, drift = 0;
    for (int i = 0; i < 500; ++i) {
      if (i % 50 == 0) drift = uniform(2) - 1;
      if (i % 20 == 0) told_.level = static_cast<int>(random() % (kRungs + 2)) - 1;
      report.time_s += uniform(0.1);
      wait_s = std::clamp(wait_s + 0.1 * drift, 0.0, 3.0);
      const bool garbage = random() % 50 == 0;
      report.oldest_wait_s = garbage ? std::nan("") : wait_s;
      report.kv_used = random() % 50 == 0 ? std::nan("") : uniform(1.1);
      report.memory_age_s = uniform(5.5);
      report.waiting = wait_s > 0 ? 1 + static_cast<int>(random() % 64) : 0;
      rule.Observe(report, ladder_);
      refused += rule.refuses();
      for (Shield* shield : {&told, &learned}) {
        shield->Observe(report, ladder_);
        if (!rule.refuses()) continue;
        ASSERT_TRUE(shield->refuses()) << trial << " " << i;
        ASSERT_GE(shield->wanted(), rule.level()) << trial << " " << i;
      }
    }
  }
  EXPECT_GT(refused, 1000) << "or nothing was tested";
}

// What no report should say.
double Odd(std::mt19937_64* random) {
  const double values[] = {-1, 1e300, -1e300, std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity()};
  return values[(*random)() % std::size(values)];
}

// Under `load`, 0 to 1 being all that there may be and more, with one signal spoiled in a quarter.
PressureReport Spoiled(double time_s, double load, std::mt19937_64* random) {
  const auto uniform = [&](double most) {
    return load * most * (static_cast<double>((*random)() >> 11) * 0x1p-53);
  };
  PressureReport report{.time_s = time_s,
                        .kv_used = uniform(1.05),
                        .kv_promised = uniform(2),
                        .queue_length = uniform(1),
                        .oldest_wait_s = uniform(0.5),
                        .step_s = uniform(0.12),
                        .memory_age_s = uniform(4),
                        .free_memory = uniform(1),
                        .foreign_memory = uniform(1),
                        .first_token_s = uniform(2),
                        .arrivals_per_s = uniform(9),
                        .running = static_cast<int>((*random)() % 64),
                        .waiting = static_cast<int>((*random)() % 256)};
  double* const signals[] = {&report.kv_used,       &report.kv_promised,    &report.queue_length,
                             &report.oldest_wait_s, &report.step_s,         &report.memory_age_s,
                             &report.free_memory,   &report.foreign_memory, &report.first_token_s,
                             &report.arrivals_per_s};
  const size_t which = (*random)() % (4 * (std::size(signals) + 2));
  if (which < std::size(signals)) {
    *signals[which] = Odd(random);
  } else if (which == std::size(signals)) {
    report.running = -1 - report.running;
  } else if (which == std::size(signals) + 1) {
    report.waiting = std::numeric_limits<int>::min();
  }
  return report;
}

void ExpectWithinLadderAndBounds(const Shield& shield, std::mt19937_64* random) {
  ASSERT_GE(shield.wanted(), 0);
  ASSERT_LT(shield.wanted(), kRungs);
  const RequestTraits traits{.allowed = 1 | ((*random)() & 31),
                             .priority = static_cast<int>((*random)())};
  const int rung = shield.ChooseRung(traits);
  ASSERT_TRUE(Has(traits.allowed, rung)) << rung;
}

TEST_F(ShieldTest, GarbageNeverLeavesTheLadderOrTheBounds) {
  constexpr int kTrials = 100, kReports = 1000;
  std::mt19937_64 random(7);
  int followed = 0, learned = 0;  // levels that the shield served for no reason of its own
  for (int trial = 0; trial < kTrials; ++trial) {
    QNetwork network({.inputs = kLevelInputs, .hidden = 8, .actions = kRungs}, &random);
    DqnPolicy dqn({}, &network);
    Shield by_told(&told_, {.load_loss = 9}), by_dqn(&dqn, {});
    const double load = (trial + 1.0) / kTrials;
    for (int i = 0; i < kReports; ++i) {
      const PressureReport report = Spoiled(i * 0.05, load, &random);
      if (i % 40 == 0) told_.level = static_cast<int>(random() % 12) - 3;
      by_told.Observe(report, ladder_);
      ASSERT_NO_FATAL_FAILURE(ExpectWithinLadderAndBounds(by_told, &random)) << trial << " " << i;
      followed += by_told.reason() == "told" && by_told.wanted() == told_.level;
      by_dqn.Observe(report, ladder_);
      ASSERT_NO_FATAL_FAILURE(ExpectWithinLadderAndBounds(by_dqn, &random)) << trial << " " << i;
      learned += by_dqn.reason() == "learned" && by_dqn.wanted() == dqn.wanted();
    }
  }
  EXPECT_GT(followed, kTrials * kReports / 20) << "or little but the rule was tested";
  EXPECT_GT(learned, kTrials * kReports / 20);
}

// Times, too, which come from our own clock: one far ahead leaves the level where it is.
TEST_F(ShieldTest, NorDoTimesOutOfOrder) {
  std::mt19937_64 random(8);
  for (int trial = 0; trial < 1000; ++trial) {
    QNetwork network({.inputs = kLevelInputs, .hidden = 8, .actions = kRungs}, &random);
    DqnPolicy dqn({}, &network);
    Shield shield(&dqn, {});
    for (int i = 0; i < 100; ++i) {
      const double time_s = random() % 50 == 0 ? Odd(&random) : i * 0.1;
      shield.Observe(Spoiled(time_s, 1, &random), ladder_);
      ASSERT_NO_FATAL_FAILURE(ExpectWithinLadderAndBounds(shield, &random)) << trial << " " << i;
    }
  }
}

}  // namespace
}  // namespace espalier
