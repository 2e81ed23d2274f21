#include "tools/perplexity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

namespace espalier {
namespace {

using testing::DoubleEq;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(PlanWindows, TakesWhatIsAskedFor) {
  const auto plan = PlanWindows(40000, 1024, 32);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->windows, 32);
  EXPECT_EQ(plan->tokens, 1024);
  EXPECT_EQ(plan->stride, 1024);
}

TEST(PlanWindows, ZeroTakesAllFullWindows) {
  EXPECT_EQ(PlanWindows(2047, 1024, 0)->windows, 1);
  EXPECT_EQ(PlanWindows(2048, 1024, 0)->windows, 2);
}

TEST(PlanWindows, AShortTextIsOneWindow) {
  const auto plan = PlanWindows(100, 1024, 0);
  EXPECT_EQ(plan->windows, 1);
  EXPECT_EQ(plan->tokens, 100);
}

TEST(PlanWindows, OverlapByAStride) {
  EXPECT_EQ(PlanWindows(2047, 1024, 0, 512)->windows, 2);
  EXPECT_EQ(PlanWindows(2048, 1024, 0, 512)->windows, 3);
  EXPECT_EQ(PlanWindows(2048, 1024, 0, 1024)->windows, 2);
  EXPECT_EQ(PlanWindows(100, 1024, 0, 512)->stride, 100) << "one window, which none overlaps";
  EXPECT_THAT(std::string(PlanWindows(9000, 1024, 0, 1025).status().message()),
              HasSubstr("a stride of 1025 leaves out tokens between windows of 1024"));
}

TEST(PlanWindows, TooLittleTextSaysHowMuchThereIs) {
  EXPECT_THAT(std::string(PlanWindows(1, 1024, 0).status().message()), HasSubstr("1 tokens"));
  EXPECT_THAT(std::string(PlanWindows(3000, 1024, 3).status().message()),
              HasSubstr("3000 tokens: 2 windows of 1024, 3 asked for"));
}

TEST(MeasurePerplexity, SumsOverWindowsAndSkipsEachFirstToken) {
  std::vector<int32_t> tokens(10);
  std::iota(tokens.begin(), tokens.end(), 0);
  std::vector<int32_t> firsts;
  // Every token but the first costs as many nats as the window's first token.
  const WindowScorer scorer = [&](std::span<const int32_t> window,
                                  int first) -> absl::StatusOr<double> {
    firsts.push_back(window.front());
    return -double(window.front()) * double(window.size() - first);
  };
  int updates = 0;
  const auto result = MeasurePerplexity(tokens, {.windows = 3, .tokens = 3, .stride = 3}, scorer,
                                        [&](int, int total) { updates += total == 3; });
  ASSERT_TRUE(result.ok());
  EXPECT_THAT(firsts, ElementsAre(0, 3, 6));
  EXPECT_THAT(result->nll_per_window, ElementsAre(DoubleEq(0), DoubleEq(6), DoubleEq(12)));
  EXPECT_EQ(result->terms, 6);
  EXPECT_DOUBLE_EQ(result->nll, 18);
  EXPECT_DOUBLE_EQ(result->mean(), 3);
  EXPECT_DOUBLE_EQ(result->perplexity(), std::exp(3.0));
  EXPECT_EQ(updates, 3);
}

TEST(MeasurePerplexity, ScoresNoTokenTwiceWhereWindowsOverlap) {
  std::vector<int32_t> tokens(20);
  std::iota(tokens.begin(), tokens.end(), 0);
  const WindowPlan plan = *PlanWindows(20, 8, 0, 3);
  std::vector<int32_t> scored;
  const auto result = MeasurePerplexity(
      tokens, plan,
      [&](std::span<const int32_t> window, int first) -> absl::StatusOr<double> {
        scored.insert(scored.end(), window.begin() + first, window.end());
        return -1;
      },
      [](int, int) {});
  ASSERT_TRUE(result.ok());
  std::vector<int32_t> want(19);  // the first of all has nothing before it
  std::iota(want.begin(), want.end(), 1);
  EXPECT_EQ(scored, want);
  EXPECT_EQ(result->terms, 19);
  EXPECT_EQ(result->nll, 5);
}

TEST(MeasurePerplexity, EndsAtTheFirstError) {
  const std::vector<int32_t> tokens(6, 1);
  int calls = 0;
  const auto result = MeasurePerplexity(
      tokens, {.windows = 3, .tokens = 2, .stride = 2},
      [&](std::span<const int32_t>, int) -> absl::StatusOr<double> {
        ++calls;
        return absl::UnavailableError("gone");
      },
      [](int, int) {});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(calls, 1);
}

TEST(WithinTolerance, IsRelative) {
  EXPECT_TRUE(WithinTolerance(17.9953, 17.99531, 1e-4));
  EXPECT_TRUE(WithinTolerance(18.08, 17.99531, 5e-3));
  EXPECT_FALSE(WithinTolerance(18.09, 17.99531, 5e-3));
  EXPECT_FALSE(WithinTolerance(17.90, 17.99531, 5e-3));
  EXPECT_FALSE(WithinTolerance(std::numeric_limits<double>::quiet_NaN(), 18, 0.1));
  EXPECT_FALSE(WithinTolerance(std::numeric_limits<double>::infinity(), 18, 0.1));
}

}  // namespace
}  // namespace espalier
