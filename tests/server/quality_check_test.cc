#include "server/quality_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <vector>

namespace espalier {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Rungs 1 and 2 are told to lose 0.1 and 0.2 nats.
Ladder ThreeRungs() {
  const SiteWidths widths{.layers = 1, .heads = 1, .channels = 4};
  Ladder ladder = Ladder::DenseOnly(widths);
  for (int rung = 1; rung <= 2; ++rung) {
    KeepProfile keep = KeepProfile::Dense(widths);
    keep.Keep(0, SiteKind::kChannels, 4 - rung);
    EXPECT_TRUE(ladder.Append({keep, keep, {.quality_loss_nats = 0.1 * rung}}));
  }
  return ladder;
}

class QualityCheckTest : public testing::Test {
 protected:
  static constexpr int kPrompt = 40, kAnswer = 8;

  // A request goes by: its answer is drawn at `rung`.
  void Serve(int rung, FinishReason end = FinishReason::kLength) {
    const RequestId id = ++id_;
    check_.Watch({.id = id, .prompt = std::vector<int32_t>(kPrompt, 3)});
    for (int i = 0; i < kAnswer; ++i) {
      check_.Follow({.id = id,
                     .tokens = {{.token = 7}},
                     .finish = i + 1 == kAnswer ? end : FinishReason::kNone,
                     .rung = rung});
    }
  }

  // The engine runs what is due, for 10 ms: each token of the text is `logprob` likely. The rung it
  // was to run at, or -1.
  int Run(float logprob) {
    const std::optional<Request> request = check_.Next(now_, Instant{0});
    if (!request.has_value()) return -1;
    EXPECT_EQ(check_.Next(now_, Instant{0}), std::nullopt) << "one at a time";
    EXPECT_TRUE(request->prompt_logprobs);
    EXPECT_EQ(request->stop.max_tokens, 0);
    now_ += milliseconds(10);
    SequenceOutput part{.id = request->id};
    part.prompt_scores.assign(10, {.logprob = logprob});
    EXPECT_TRUE(check_.Take(part, now_));
    SequenceOutput last{.id = request->id, .finish = FinishReason::kLength};
    last.prompt_scores.assign(request->prompt.size() - 11, {.logprob = logprob});
    EXPECT_TRUE(check_.Take(last, now_));
    EXPECT_FALSE(check_.Take(last, now_)) << "it is over";
    return *request->bounds.rung;
  }
  int RunLater(float logprob) {
    now_ += seconds(1);
    return Run(logprob);
  }

  QualityCheck check_{{.share = 0.1, .bound = 0.5, .idle_s = 0.2, .enough = 100, .window = 400},
                      ThreeRungs()};
  RequestId id_ = 0;
  Instant now_{seconds(1)};
};

TEST_F(QualityCheckTest, TellsWhatARungLosesOnPromptsAndHowFarItsAnswersAre) {
  EXPECT_EQ(Run(-1), -1) << "nothing was served yet";
  Serve(2);
  EXPECT_EQ(Run(-2.5), 2) << "the rung of the answer";
  EXPECT_EQ(RunLater(-2), 0);
  EXPECT_EQ(check_.checks(), 1);
  EXPECT_EQ(check_.prompts(2).tokens, kPrompt - 1);
  EXPECT_FLOAT_EQ(check_.prompts(2).mean, 0.5);
  EXPECT_FLOAT_EQ(check_.prompts(2).standard_error, 0);
  EXPECT_EQ(check_.answers(2).tokens, kAnswer);
  EXPECT_FLOAT_EQ(check_.answers(2).mean, -0.5);
  EXPECT_EQ(check_.prompts(1).tokens, 0);
  EXPECT_EQ(RunLater(-1), -1) << "a text is looked at once";
}

TEST_F(QualityCheckTest, TextsThatWereServedInFullAreScoredAtEachRungInTurn) {
  std::vector<int> rungs;
  for (int i = 0; i < 3; ++i) {
    Serve(0);
    rungs.push_back(RunLater(-2));
    EXPECT_EQ(RunLater(-2), 0);
  }
  EXPECT_THAT(rungs, testing::ElementsAre(1, 2, 1));
  EXPECT_EQ(check_.answers(1).tokens, 0) << "they are not its answers";
}

TEST_F(QualityCheckTest, LooksOnlyAtTextsThatAreWhole) {
  Serve(1, FinishReason::kDeadline);
  EXPECT_EQ(RunLater(-1), -1);
  check_.Watch({.id = 77, .prompt = std::vector<int32_t>(kPrompt, 3)});
  check_.Forget(77);
  check_.Follow({.id = 77, .finish = FinishReason::kStop});
  EXPECT_EQ(RunLater(-1), -1);
  check_.Watch({.id = 78, .prompt = {1, 2, 3}});
  check_.Follow({.id = 78, .finish = FinishReason::kStop});
  EXPECT_EQ(RunLater(-1), -1) << "too short";
  Serve(1);
  EXPECT_EQ(RunLater(-1), 1);
}

TEST_F(QualityCheckTest, WaitsUntilTheEngineIsIdleAndTakesItsShareOfTime) {
  Serve(1);
  EXPECT_EQ(check_.Due(now_), now_ + milliseconds(200));
  EXPECT_EQ(check_.Due(kNever), kNever) << "it is not idle yet";
  EXPECT_EQ(check_.Next(now_, kNever), std::nullopt);
  EXPECT_EQ(check_.Next(now_ + milliseconds(199), now_), std::nullopt);
  EXPECT_EQ(Run(-1), 1);
  EXPECT_EQ(check_.Due(Instant{0}), now_ + milliseconds(90)) << "10 ms of 100";
  EXPECT_EQ(Run(-1), -1);
  now_ += milliseconds(90);
  EXPECT_EQ(Run(-1), 0);
  EXPECT_EQ(check_.Due(Instant{0}), kNever);
}

TEST_F(QualityCheckTest, BeginsAnewWhatWasCancelledForOthers) {
  Serve(1);
  EXPECT_EQ(RunLater(-3), 1);
  now_ += seconds(1);
  const std::optional<Request> second = check_.Next(now_, Instant{0});
  ASSERT_TRUE(second.has_value());
  SequenceOutput part{.id = second->id};
  part.prompt_scores.assign(5, {.logprob = -99});
  EXPECT_TRUE(check_.Take(part, now_));
  check_.Abandon(now_);
  EXPECT_EQ(check_.running(), std::nullopt);
  EXPECT_EQ(RunLater(-2), 0);
  EXPECT_FLOAT_EQ(check_.prompts(1).mean, 1);
  Serve(1);
  now_ += seconds(1);
  ASSERT_TRUE(check_.Next(now_, Instant{0}).has_value());
  check_.Drop();
  EXPECT_EQ(RunLater(-2), -1);
}

TEST_F(QualityCheckTest, ARungThatLosesFarMoreThanToldIsServedNoMoreUntilItDoesNot) {
  const auto check = [&](float loss) {
    Serve(2);
    EXPECT_EQ(RunLater(-2 - loss), 2);
    EXPECT_EQ(RunLater(-2), 0);
  };
  check(0.8f);
  check(0.8f);
  EXPECT_EQ(check_.hardest(), 2) << "too few tokens to judge by";
  check(0.8f);
  EXPECT_EQ(check_.hardest(), 1) << "0.8 is more than 0.2 + 0.5";
  EXPECT_NEAR(check_.losses()[2], (117 * 0.8 + 4096 * 0.2) / (117 + 4096), 1e-6);
  EXPECT_DOUBLE_EQ(check_.losses()[1], 0.1) << "as calibrated";
  for (int i = 0; i < 10; ++i) check(0.3f);
  EXPECT_EQ(check_.hardest(), 2);
  for (int i = 0; i < 20; ++i) check(-9);
  EXPECT_EQ(check_.losses()[2], 1e-3) << "nothing lost is the full model's alone";
}

}  // namespace
}  // namespace espalier
