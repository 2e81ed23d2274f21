#include "engine/sim/cost_model.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

const CostModel kTrue{.rungs = {{.fixed = 8e-3, .decode = 1e-3, .prefill = 4e-4},
                                {.fixed = 5e-3, .decode = 7e-4, .prefill = 3e-4}},
                      .attended = 2e-8};

StepContents Shape(StepContents::Rows dense, StepContents::Rows pruned, double attended) {
  return {.rungs = {dense, pruned}, .attended = attended};
}

std::vector<TimedStep> Steps(double noise) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> factor(1 - noise, 1 + noise);
  std::vector<TimedStep> steps;
  for (const int rung : {0, 1}) {
    for (const int decode : {0, 1, 4, 16, 32}) {
      for (const int prefill : {0, 32, 128, 512}) {
        if (decode + prefill == 0) continue;
        for (const double context : {32.0, 500.0}) {
          StepContents shape = Shape({}, {}, context * (decode + prefill));
          shape.rungs[rung] = {.decode = decode, .prefill = prefill};
          steps.push_back({.shape = shape, .seconds = kTrue.Seconds(shape) * factor(random)});
        }
      }
    }
  }
  return steps;
}

TEST(CostModel, TheWidestRungPaysForTheWeights) {
  EXPECT_DOUBLE_EQ(kTrue.Seconds(Shape({2, 0}, {3, 100}, 1000)),
                   8e-3 + 2e-3 + 2.1e-3 + 30e-3 + 2e-5);
  EXPECT_DOUBLE_EQ(kTrue.Seconds(Shape({}, {3, 0}, 0)), 5e-3 + 2.1e-3);
}

TEST(CostModel, IsFoundAgain) {
  CostFit fit;
  ASSERT_TRUE(FitCosts(Steps(0), 2, &fit));
  for (int rung = 0; rung < 2; ++rung) {
    EXPECT_NEAR(fit.model.rungs[rung].fixed, kTrue.rungs[rung].fixed, 1e-9);
    EXPECT_NEAR(fit.model.rungs[rung].decode, kTrue.rungs[rung].decode, 1e-9);
    EXPECT_NEAR(fit.model.rungs[rung].prefill, kTrue.rungs[rung].prefill, 1e-9);
  }
  EXPECT_NEAR(fit.model.attended, kTrue.attended, 1e-12);
  EXPECT_GT(fit.r_squared, 1 - 1e-9);
  EXPECT_LT(fit.worst_error, 1e-6);
}

TEST(CostModel, IsFoundAgainInNoise) {
  CostFit fit;
  ASSERT_TRUE(FitCosts(Steps(0.1), 2, &fit));
  EXPECT_NEAR(fit.model.rungs[1].prefill, 3e-4, 3e-5);
  EXPECT_LT(fit.r_squared, 1);
  EXPECT_GT(fit.r_squared, 0.95);
  EXPECT_LT(fit.worst_error, 0.2);
  EXPECT_GT(fit.worst_error, fit.median_error);
}

TEST(CostModel, IsNeverNegative) {
  std::vector<TimedStep> steps = Steps(0);
  for (TimedStep& step : steps) step.seconds -= 3.9e-3 * (step.shape.rungs[0].decode > 0);
  for (TimedStep& step : steps) step.seconds = std::max(step.seconds, 1e-4);
  CostFit fit;
  ASSERT_TRUE(FitCosts(steps, 2, &fit));
  for (const RungCost& cost : fit.model.rungs) {
    EXPECT_GE(cost.fixed, 0);
    EXPECT_GE(cost.decode, 0);
    EXPECT_GE(cost.prefill, 0);
  }
}

TEST(CostModel, NeedsStepsOfEachRung) {
  std::vector<TimedStep> steps = Steps(0);
  std::erase_if(steps, [](const TimedStep& step) { return step.shape.rungs[1].decode > 0; });
  CostFit fit;
  EXPECT_FALSE(FitCosts(steps, 2, &fit));  // of rung 1 only prefill
  EXPECT_FALSE(FitCosts({}, 1, &fit));
}

TEST(CostModel, ReadsWhatItWrote) {
  const std::string text = FormatCosts(kTrue, "measured\nhere");
  EXPECT_EQ(
      text,
      "espalier-costs 1\n# measured\n# here\nattended 0.02\n"
      "rung 0 fixed=8000 decode=1000 prefill=400\nrung 1 fixed=5000 decode=700 prefill=300\n");
  CostModel read;
  std::string error;
  ASSERT_TRUE(ParseCosts(text, &read, &error)) << error;
  EXPECT_EQ(FormatCosts(read, "measured\nhere"), text);
}

TEST(CostModel, SaysTheLineAndWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "line 1: expected 'espalier-costs 1'"},
      {"espalier-costs 1\n", "it has no rung"},
      {"espalier-costs 1\nattended x", "line 2: attended: expected microseconds"},
      {"espalier-costs 1\nattended 1\nattended 1", "line 3: attended a second time"},
      {"espalier-costs 1\nrung 1", "line 2: expected rung 0"},
      {"espalier-costs 1\nrung 0 fixed=1", "line 2: expected decode= and microseconds"},
      {"espalier-costs 1\nrung 0 fixed=-1 decode=1 prefill=1",
       "line 2: expected fixed= and microseconds"},
      {"espalier-costs 1\nrung 0 fixed=1 decode=nan prefill=1",
       "line 2: expected decode= and microseconds"},
      {"espalier-costs 1\nrung 0 fixed=1 decode=1 prefill=1 x",
       "line 2: more than fixed, decode and prefill"},
      {"espalier-costs 1\nstep", "line 2: expected attended or rung"},
  };
  for (const auto& [text, expected] : cases) {
    CostModel read = kTrue;
    std::string error;
    EXPECT_FALSE(ParseCosts(text, &read, &error)) << text;
    EXPECT_EQ(error, expected) << text;
    EXPECT_EQ(read, kTrue);
  }
}

}  // namespace
}  // namespace espalier
