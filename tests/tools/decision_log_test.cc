// What a policy decided, written as a server writes it, is decided alike by `espalier replay`.
#include "server/decision_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>

#include "policy/capped_policy.h"
#include "policy/ladder_file.h"
#include "tests/support/run_command.h"

namespace espalier {
namespace {

using testing::EndsWith;
using testing::HasSubstr;
using testing::StartsWith;

constexpr char kLadder[] =
    "espalier-ladder 1\nmodel layers=1 heads=2 channels=64\nrung 0 loss=0\n"
    "rung 1 loss=0.1 channels=32*1\nrung 2 loss=0.3 channels=0*1\n";

TEST(DecisionLog, IsReplayedAlikeWithItsLossesCapsAndChoices) {
  const std::string ladder_path = testing::TempDir() + "decision_log_test.ladder";
  const std::string path = testing::TempDir() + "decision_log_test.log";
  std::ofstream(ladder_path) << kLadder;
  Ladder ladder = Ladder::DenseOnly({});
  std::string error;
  ASSERT_TRUE(ParseLadder(kLadder, &ladder, &error)) << error;
  const LadderPolicyOptions options{.load_loss = 0.2};
  LadderPolicy rule(options);
  CappedPolicy capped(&rule);
  {
    absl::StatusOr<std::unique_ptr<DecisionLog>> log = DecisionLog::Create(path, options);
    ASSERT_TRUE(log.ok()) << log.status();
    LoggedPolicy policy(&capped, log->get());
    std::mt19937_64 random(3);
    for (int i = 0; i < 400; ++i) {
      policy.Observe({.time_s = 0.1 * i,
                      .kv_used = static_cast<double>(random() % 1100) / 1000,
                      .oldest_wait_s = static_cast<double>(random() % 500) / 1000},
                     ladder);
      const RequestTraits traits{.allowed = 1 | random() % 8,
                                 .priority = static_cast<int>(random())};
      policy.Chose(i, traits, policy.ChooseRung(traits));
      if (i == 100) ladder.SetQualityLoss(1, 0.25);  // so that load may raise the level no more
      if (i == 200 || i == 300) {
        capped.set_hardest(i == 200 ? 1 : 2);
        (*log)->AddCap(i == 200 ? 1 : 2);
      }
    }
  }
  const Outcome outcome = RunWith({"replay", path, "--ladder", ladder_path});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("400 decisions, "));
  EXPECT_THAT(outcome.out, HasSubstr(", 400 rungs of requests, 0 not as logged"));

  // Each of them counts: without it something is decided otherwise.
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  for (const char* line : {"{\"losses\":[0,0.25,0.3]}\n", "{\"cap\":1}\n"}) {
    std::string without = text;
    const size_t at = without.find(line);
    ASSERT_NE(at, without.npos) << line;
    std::ofstream(path) << without.erase(at, std::string(line).size());
    EXPECT_EQ(RunWith({"replay", path, "--ladder", ladder_path}).code, 1) << line;
  }
}

TEST(DecisionLog, KeepsTheLastLinesWithoutAFile) {
  absl::StatusOr<std::unique_ptr<DecisionLog>> log = DecisionLog::Create("", {}, "a network");
  ASSERT_TRUE(log.ok()) << log.status();
  const std::string first = (*log)->Recent(9);
  EXPECT_THAT(first, StartsWith(R"({"policy":"dqn","network":"a network","version":3,)"));
  EXPECT_EQ(std::ranges::count(first, '\n'), 1);
  const int64_t before = 100'000;
  for (int i = 0; i < before; ++i) (*log)->AddCap(i % 10);
  EXPECT_EQ((*log)->Recent(0), first);
  EXPECT_EQ((*log)->Recent(2), first + "{\"cap\":8}\n{\"cap\":9}\n");
  const std::string all = (*log)->Recent(SIZE_MAX);
  EXPECT_THAT(all, StartsWith(first + "{\"cap\":"));
  EXPECT_THAT(all, EndsWith("}\n{\"cap\":9}\n"));
  const auto kept = std::ranges::count(all, '\n');
  EXPECT_GT(kept, 20'000);
  EXPECT_LT(kept, 60'000) << "and no more than fits";
}

}  // namespace
}  // namespace espalier
