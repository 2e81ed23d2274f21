// `espalier replay` on logs of a policy, and on logs that nobody wrote.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>

#include "policy/capped_policy.h"
#include "policy/ladder_file.h"
#include "server/decision_log.h"
#include "tests/support/run_command.h"

namespace espalier {
namespace {

using testing::HasSubstr;

class ReplayTest : public testing::Test {
 protected:
  ReplayTest() {
    std::ofstream(ladder_) << "espalier-ladder 1\nmodel layers=1 heads=2 channels=64\n"
                              "rung 0 loss=0\nrung 1 loss=0.1 channels=32*1\n";
  }

  Outcome Replay(const std::string& head, const std::string& line) const {
    std::ofstream(log_) << head << "\n" << line << "\n";
    return RunWith({"replay", log_, "--ladder", ladder_});
  }

  // `text` with the value of `field` replaced, which is there.
  static std::string With(std::string text, const std::string& field, const std::string& value) {
    const size_t name = text.find('"' + field + "\":");
    EXPECT_NE(name, std::string::npos) << field;
    const size_t begin = name + field.size() + 3;
    size_t end = text.find(text[begin] == '[' ? ']' : ',', begin);
    if (end == std::string::npos) end = text.find('}', begin);
    if (text[begin] == '[') ++end;
    return text.replace(begin, end - begin, value);
  }

  const std::string ladder_ = testing::TempDir() + "replay_test.ladder",
                    log_ = testing::TempDir() + "replay_test.log";
  const std::string head_ =
      R"({"policy":"ladder","network":"","version":3,"ttft_target_s":1,"tpot_target_s":0.1,)"
      R"("kv_lower":0.9,"load_loss":0.2,"wait":[0.25,0.1],"step":[1,0.75],)"
      R"("raise_dwell_s":0.2,"lower_dwell_s":0.25})";
  const std::string line_ =
      R"({"time_s":7,"kv_used":0.5,"kv_promised":0.1,"queue_length":0.1,"oldest_wait_s":0.6,)"
      R"("step_s":0.02,"memory_age_s":0.1,"free_memory":0.5,"foreign_memory":0.25,)"
      R"("first_token_s":0.3,"arrivals_per_s":4,"running":3,"waiting":2,"rung":1,"hardest":1,)"
      R"("reason":"queue","refuses_behind_s":0.25})";
  const std::string choice_ = R"({"request":7,"allowed":3,"priority":0,"wanted":0,"rung":1})";
};

TEST_F(ReplayTest, DecidesAgain) {
  const Outcome outcome = Replay(head_, line_);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(
      outcome.out,
      HasSubstr("1 decisions, 1 changes of the level, 0 rungs of requests, 0 not as logged"));
  EXPECT_THAT(
      Replay(head_, With(line_, "oldest_wait_s", "0")).err,
      HasSubstr(
          "line 2: rung 0 of 1 by none, logged rung 1 of 1 by queue, refusing behind 0.25 s"));
}

TEST_F(ReplayTest, GoesByLossesAndCapsAndDecidesForRequests) {
  // Where rung 1 loses more than load may cost, there is none to raise to.
  const std::string lost =
      With(With(With(line_, "rung", "0"), "hardest", "0"), "reason", "\"none\"");
  EXPECT_EQ(Replay(head_, "{\"losses\":[0,0.3]}\n" + lost).code, 0);
  const std::string capped =
      With(With(With(line_, "rung", "0"), "hardest", "0"), "reason", "\"quality\"");
  EXPECT_EQ(Replay(head_, "{\"cap\":0}\n" + capped).code, 0);
  const Outcome outcome =
      Replay(head_, choice_ + "\n" + line_ + "\n" + With(choice_, "wanted", "1"));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("2 rungs of requests, 0 not as logged"));
  EXPECT_EQ(Replay(head_, With(choice_, "priority", "-2147483648")).code, 0);
  EXPECT_THAT(Replay(head_, With(choice_, "rung", "5")).err,
              HasSubstr("line 2: rung 5 is none that was allowed"));
  EXPECT_THAT(
      Replay(head_, With(line_, "refuses_behind_s", "0.5")).err,
      HasSubstr("refusing behind 0.25 s, logged rung 1 of 1 by queue, refusing behind 0.5"));
  EXPECT_THAT(Replay(head_, With(choice_, "wanted", "1")).err,
              HasSubstr("line 2: rung 0, logged 1"));
  for (const char* field : {"allowed", "priority", "wanted", "rung"}) {
    for (const char* value : {"1e300", "null", "[1]"}) {
      EXPECT_THAT(Replay(head_, With(choice_, field, value)).err,
                  HasSubstr(std::string("line 2: ") + field + ": expected "))
          << value;
    }
  }
  EXPECT_THAT(Replay(head_, R"({"losses":[0]})").err,
              HasSubstr("line 2: losses: expected 2 numbers, got array"));
  EXPECT_THAT(Replay(head_, R"({"losses":[0,-1]})").err,
              HasSubstr("line 2: losses: expected a number from 0 to "));
  EXPECT_THAT(Replay(head_, R"({"cap":65})").err,
              HasSubstr("line 2: cap: expected a number from 0 to 64, got 65"));
}

TEST_F(ReplayTest, NamesTheLineAndTheFieldThatIsOutOfRange) {
  for (const char* field : {"version", "ttft_target_s", "tpot_target_s", "kv_lower", "load_loss",
                            "wait", "step", "raise_dwell_s", "lower_dwell_s"}) {
    for (const char* value : {"-1", "1e300", "null", "\"x\"", "[[[]]]", "[1e300,0]"}) {
      const Outcome outcome = Replay(With(head_, field, value), line_);
      EXPECT_EQ(outcome.code, 1);
      EXPECT_THAT(outcome.err, HasSubstr(std::string("line 1: ") + field + ": expected ")) << value;
    }
  }
  for (const char* field : {"ttft_target_s", "tpot_target_s", "lower_dwell_s"}) {
    EXPECT_THAT(Replay(With(head_, field, "0"), line_).err,
                HasSubstr(std::string(field) + ": expected a number from 1e-06 to "));
  }
  for (const char* field :
       {"time_s", "kv_used", "kv_promised", "queue_length", "oldest_wait_s", "step_s",
        "memory_age_s", "free_memory", "foreign_memory", "first_token_s", "arrivals_per_s",
        "running", "waiting", "rung", "hardest"}) {
    for (const char* value : {"-1", "1e300", "18446744073709551615", "null", "[1]"}) {
      EXPECT_THAT(Replay(head_, With(line_, field, value)).err,
                  HasSubstr(std::string("line 2: ") + field + ": expected "))
          << value;
    }
  }
  EXPECT_THAT(Replay(head_, With(line_, "running", "1.5")).err,
              HasSubstr("line 2: running: expected a whole number from 0 to 2147483647, got 1.5"));
  EXPECT_THAT(Replay(head_, R"({"dropped":1e300})").err, HasSubstr("line 2: dropped: expected "));
  EXPECT_THAT(Replay(head_, "7").err, HasSubstr("line 2: time_s: expected "));
  EXPECT_THAT(Replay("[]", line_).err, HasSubstr("line 1: policy: expected a text, got null"));
  EXPECT_THAT(
      Replay(head_, With(line_, "kv_used", std::string(100'000, '[') + std::string(100'000, ']')))
          .err,
      HasSubstr("line 2: kv_used: expected a number from 0 to 1000000000000, got array"));
}

constexpr char kLadder[] =
    "espalier-ladder 1\nmodel layers=1 heads=2 channels=64\nrung 0 loss=0\n"
    "rung 1 loss=0.1 channels=32*1\nrung 2 loss=0.3 channels=0*1\n";

TEST(Replay, DecidesAlikeByTheLossesAndCapsThatItIsTold) {
  const std::string ladder_path = testing::TempDir() + "replay_test_of_policy.ladder";
  const std::string path = testing::TempDir() + "replay_test_of_policy.log";
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

}  // namespace
}  // namespace espalier
