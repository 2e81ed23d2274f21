// Who runs in which step: order, admission, preemption, ends, refusals, and what policies see.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/engine/scheduling/scheduler_scenes.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST_F(SchedulerTest, DecodesComeFirstAndPrefillChunksFillTheRest) {
  Make(16);
  Submit(1, {.prompt = 3});
  Submit(2, {.prompt = 12});
  EXPECT_EQ(Step(), "1[0,3) 2[0,5)");
  EXPECT_EQ(Step(), "1@3 2[5,12)");
  EXPECT_EQ(Step(), "1@4 2@12");
  EXPECT_EQ(Step(), "1@5 2@13");
  EXPECT_THAT(Ended(), ElementsAre("1:length"));
  EXPECT_EQ(Step(), "2@14");
  EXPECT_THAT(Ended(), ElementsAre("2:length"));
  EXPECT_EQ(Step(), "");
  EXPECT_TRUE(scheduler_->idle());
}

TEST_F(SchedulerTest, HigherPriorityIsPrefilledFirstEvenIfItComesLater) {
  Make(16);
  Submit(1, {.prompt = 20});
  EXPECT_EQ(Step(), "1[0,8)");
  Submit(2, {.prompt = 5});
  Submit(3, {.prompt = 6, .priority = 1});
  EXPECT_EQ(Step(), "3[0,6) 1[8,10)");
  EXPECT_EQ(Step(), "3@6 1[10,17)");
  EXPECT_EQ(Step(), "3@7 1[17,20) 2[0,4)");
}

TEST_F(SchedulerTest, NobodyOvertakesARequestThatWaitsForRoom) {
  Make(6, {.max_batch_tokens = 32, .reserve_output = 1});
  Submit(1, {.prompt = 8, .max_tokens = 4});   // 3 pages of each layer
  Submit(2, {.prompt = 12, .max_tokens = 4});  // 4
  Submit(3, {.prompt = 1, .max_tokens = 1});   // 1: would fit beside 1
  EXPECT_EQ(Step(), "1[0,8)");
  EXPECT_EQ(Step(), "1@8");
  EXPECT_EQ(Step(), "1@9");
  EXPECT_EQ(Step(), "1@10");
  EXPECT_EQ(Step(), "2[0,12) 3[0,1)");
}

TEST_F(SchedulerTest, AFloodOfSmallRequestsDoesNotStarveALongOne) {
  Make(8, {.max_batch_tokens = 16, .max_sequences = 4, .max_waiting = 100});
  RequestId next = 1;
  for (; next <= 10; ++next) Submit(next, {.prompt = 3, .max_tokens = 5});
  Submit(1000, {.prompt = 28, .max_tokens = 4});  // the whole pool
  bool finished = false;
  int steps = 0;
  for (; !finished && steps < 100; ++steps) {
    Submit(next++, {.prompt = 3, .max_tokens = 5});
    Step();
    for (const SequenceOutput& output : outputs_) {
      finished |= output.id == 1000 && output.finish == FinishReason::kLength;
    }
  }
  EXPECT_TRUE(finished);
  EXPECT_LT(steps, 40);  // 10 small ones before it, 4 at a time, 5 steps each; 2 chunks, 3 decodes
}

TEST_F(SchedulerTest, TheReserveDecidesHowManyRunAtOnce) {
  // 8 pages of 4 tokens a layer; each request is 4 + 12 tokens: promises of 1, 3 and 4 pages.
  for (const auto& [reserve, running] : {std::pair(0.0, 8), std::pair(0.5, 2), std::pair(1.0, 2)}) {
    Make(8, {.max_batch_tokens = 64, .reserve_output = reserve});
    for (RequestId id = 1; id <= 10; ++id) Submit(id, {.prompt = 4, .max_tokens = 12});
    Step();
    EXPECT_EQ(scheduler_->stats().running, running) << reserve;
  }
}

TEST_F(SchedulerTest, PreemptionTakesTheYoungestAndReplaysItsTokens) {
  Make(4, {.max_batch_tokens = 32, .reserve_output = 0});
  Submit(1, {.prompt = 4, .max_tokens = 10});
  Submit(2, {.prompt = 8, .max_tokens = 6});
  EXPECT_EQ(Step(), "1[0,4) 2[0,8)");  // 3 of 4 pages
  EXPECT_EQ(Step(), "1@4");            // 1 enters the last page, 2 finds none and goes itself
  EXPECT_EQ(scheduler_->stats().preemptions, 1u);
  EXPECT_EQ(scheduler_->stats().pages_used, 2 * kLayers);
  for (int position = 5; position < 13; ++position) {
    EXPECT_EQ(Step(), fmt::format("1@{}", position));
  }
  EXPECT_THAT(Ended(), ElementsAre("1:length"));
  EXPECT_EQ(Step(), "2[0,9)");  // the prompt and the token drawn before
  EXPECT_EQ(outputs_[0].preemptions, 1);
  EXPECT_EQ(scheduler_->stats().recomputed_tokens, 8u);
  std::vector<int32_t> rest = {outputs_[0].tokens[0].token};
  for (const int32_t token : RunToEnd(2)) rest.push_back(token);
  const std::vector<int32_t> answer =
      puppet_->Answer(MakeRequest(2, {.prompt = 8, .max_tokens = 6}));
  EXPECT_EQ(rest, std::vector<int32_t>(answer.begin() + 1, answer.end()));
}

TEST_F(SchedulerTest, AVictimOfTheSameStepHasNoRowsInIt) {
  Make(4, {.max_batch_tokens = 32, .reserve_output = 0});
  Submit(1, {.prompt = 4, .max_tokens = 8, .priority = -1});
  Submit(2, {.prompt = 4, .max_tokens = 8});
  Submit(3, {.prompt = 4, .max_tokens = 8});
  EXPECT_EQ(Step(), "2[0,4) 3[0,4) 1[0,4)");
  EXPECT_EQ(Step(), "2@4 3@4");  // 3 wants a page too; 1 has the lowest priority, though the oldest
  EXPECT_EQ(scheduler_->stats().preemptions, 1u);
  EXPECT_EQ(scheduler_->stats().waiting, 1);
}

TEST_F(SchedulerTest, ADeadlineEndsQueuedPrefillingAndDecodingSequencesBeforeTheStep) {
  Make(8, {.max_batch_tokens = 8, .max_sequences = 2});
  Submit(1, {.prompt = 2, .max_tokens = 9, .deadline = Instant{10}});
  Submit(2, {.prompt = 20, .deadline = Instant{10}});
  Submit(3, {.prompt = 2, .deadline = Instant{10}});
  Submit(4, {.prompt = 2, .deadline = Instant{11}});
  EXPECT_EQ(Step(Instant{9}), "1[0,2) 2[0,6)");
  EXPECT_EQ(Step(Instant{10}), "4[0,2)");
  EXPECT_THAT(Ended(), ElementsAre("1:deadline", "2:deadline", "3:deadline"));
  EXPECT_EQ(outputs_[0].output_tokens, 1);
  EXPECT_EQ(outputs_[0].first_scheduled, Instant{9});
  EXPECT_EQ(outputs_[2].first_scheduled, kNever);
  EXPECT_EQ(scheduler_->stats().pages_used, kLayers);
}

TEST_F(SchedulerTest, CancelFreesPagesInAnyState) {
  Make(8, {.max_batch_tokens = 8, .max_sequences = 2});
  Submit(1, {.prompt = 2});
  Submit(2, {.prompt = 20});
  Submit(3, {.prompt = 2});
  EXPECT_EQ(Step(), "1[0,2) 2[0,6)");
  EXPECT_EQ(scheduler_->stats().pages_used, 6 * kLayers);
  EXPECT_TRUE(scheduler_->Cancel(2));
  EXPECT_EQ(scheduler_->stats().pages_used, kLayers);
  EXPECT_TRUE(scheduler_->Cancel(1));
  EXPECT_TRUE(scheduler_->Cancel(3));
  EXPECT_FALSE(scheduler_->Cancel(3));
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(scheduler_->stats().pages_free, scheduler_->stats().pages_total);
  EXPECT_EQ(Step(), "");
}

TEST_F(SchedulerTest, SubmitNamesWhatIsWrong) {
  Make(8, {.max_batch_tokens = 8, .max_waiting = 2});
  const auto status = [this](RequestId id, Asked asked) {
    return scheduler_->Submit(MakeRequest(id, asked));
  };
  EXPECT_EQ(status(1, {.prompt = 0}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status(1, {.max_tokens = 0}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status(1, {.max_tokens = -1}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(scheduler_->max_sequence_tokens(), 32);
  const absl::Status never = status(1, {.prompt = 30, .max_tokens = 3});
  EXPECT_EQ(never.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(never.message()), HasSubstr("30 + 3 tokens"));
  EXPECT_THAT(std::string(never.message()), HasSubstr("longest sequence is 32 tokens"));
  EXPECT_EQ(status(1, {.prompt = 1, .max_tokens = std::numeric_limits<int>::max()}).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(status(1, {.prompt = 30, .max_tokens = 2}), absl::OkStatus());
  EXPECT_EQ(status(1, {}).code(), absl::StatusCode::kInvalidArgument);  // a live id
  EXPECT_EQ(status(2, {}), absl::OkStatus());
  const absl::Status full = status(3, {});
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("2 requests wait already"));
}

TEST_F(SchedulerTest, TheContextBoundsASequenceTooIfThePoolIsLarge) {
  Make(100);
  EXPECT_EQ(scheduler_->max_sequence_tokens(), 64);
}

TEST_F(SchedulerTest, StopTokensEndAnAnswerButNotBeforeMinTokens) {
  Make(8);
  Request request = MakeRequest(1, {.prompt = 2, .max_tokens = 8});
  request.stop.stop_tokens = {7, 8};
  request.stop.min_tokens = 2;
  puppet_->Tell(1, {8, 5, 6, 7});  // the 8 is banned, 9 comes in its place
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  std::vector<int32_t> tokens;
  for (int step = 0; step < 4; ++step) {
    Step();
    for (const TokenResult& token : outputs_.at(0).tokens) tokens.push_back(token.token);
  }
  EXPECT_THAT(tokens, ElementsAre(9, 5, 6));
  EXPECT_THAT(Ended(), ElementsAre("1:stop"));
  EXPECT_EQ(outputs_[0].output_tokens, 3);
}

TEST_F(SchedulerTest, ScoresComeChunkByChunkAndEndWithThePrompt) {
  Make(8, {.max_batch_tokens = 4});
  Request request = MakeRequest(1, {.prompt = 6, .max_tokens = 0});
  request.prompt_logprobs = true;
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  EXPECT_EQ(Step(), "1[0,4)");
  ASSERT_EQ(outputs_.size(), 1u);
  EXPECT_EQ(outputs_[0].prompt_scores.size(), 4u);
  EXPECT_EQ(outputs_[0].prompt_scores[0].token, 101);
  EXPECT_EQ(Step(), "1[4,6)");
  EXPECT_EQ(outputs_.at(0).prompt_scores.size(), 1u);
  EXPECT_EQ(outputs_[0].prompt_scores[0].token, 105);
  EXPECT_THAT(Ended(), ElementsAre("1:length"));
}

TEST_F(SchedulerTest, OneTokenHasNothingToScoreAndEnds) {
  Make(8);
  Request request = MakeRequest(1, {.prompt = 1, .max_tokens = 0});
  request.prompt_logprobs = true;
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  EXPECT_EQ(Step(), "1[0,1)");
  EXPECT_THAT(Ended(), ElementsAre("1:length"));
  EXPECT_THAT(outputs_[0].prompt_scores, IsEmpty());
}

TEST_F(SchedulerTest, APreemptedScoreIsNotToldTwice) {
  Make(4, {.max_batch_tokens = 6, .reserve_output = 0});
  Submit(1, {.prompt = 4, .max_tokens = 6});
  Request request = MakeRequest(2, {.prompt = 12, .max_tokens = 0});
  request.prompt_logprobs = true;
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  EXPECT_EQ(Step(), "1[0,4) 2[0,2)");
  EXPECT_EQ(Step(), "1@4");  // takes the page that 2 has to give up
  int scores = 2;
  while (!scheduler_->idle()) {
    Step();
    for (const SequenceOutput& output : outputs_) {
      scores += static_cast<int>(output.prompt_scores.size());
      EXPECT_EQ(output.preemptions, output.id == 2 ? 1 : 0);
    }
  }
  EXPECT_EQ(scores, 11);
}

TEST_F(SchedulerTest, ABatchThatWasNotComputedIsMadeAgain) {
  Make(8);
  Submit(1, {.prompt = 3});
  ASSERT_FALSE(scheduler_->Schedule(Instant{0}, &outputs_).empty());
  scheduler_->Discard();
  scheduler_->CheckInvariants();
  EXPECT_EQ(Step(), "1[0,3)");
}

TEST_F(SchedulerTest, TellsThePolicyHowLongStepsTake) {
  Told told;
  policy_ = &told;
  Make(8);
  Submit(1, {.prompt = 3, .max_tokens = 4});
  Step(std::chrono::milliseconds(500));
  EXPECT_EQ(told.seen.step_s, 0);
  EXPECT_EQ(told.seen.time_s, 0.5);
  Step(std::chrono::milliseconds(520));
  EXPECT_DOUBLE_EQ(told.seen.step_s, 0.002) << "a tenth of the new one";
  Step(std::chrono::milliseconds(550));
  EXPECT_DOUBLE_EQ(told.seen.step_s, 0.0048);
  Step(std::chrono::milliseconds(570));
  ASSERT_TRUE(scheduler_->idle());
  Submit(2, {.prompt = 3, .max_tokens = 2});
  Step(std::chrono::seconds(9));
  EXPECT_EQ(told.seen.step_s, 0) << "idle time is none of a step";
}

TEST_F(SchedulerTest, SlowStepsBeforeAPauseAreForgotten) {
  Told told;
  policy_ = &told;
  Make(8);
  const auto serve = [&](RequestId id, Instant now, Instant step) {
    Submit(id, {.prompt = 3, .max_tokens = 12});
    double most = 0;
    for (; !scheduler_->idle(); now += step) {
      Step(now);
      most = std::max(most, told.seen.step_s);
    }
    return most;
  };
  EXPECT_GT(serve(1, std::chrono::seconds(1), std::chrono::milliseconds(500)), 0.3);
  EXPECT_LT(serve(2, std::chrono::seconds(60), std::chrono::milliseconds(10)), 0.01);
}

TEST_F(SchedulerTest, PressureIsInSharesOfTheLimits) {
  Make(8, {.max_batch_tokens = 64, .max_sequences = 1, .max_waiting = 4, .reserve_output = 0.5});
  Submit(1, {.prompt = 8});
  Step();
  Request request = MakeRequest(2, {.prompt = 4, .max_tokens = 8});  // 4 + 4 tokens: 2 of 8 pages
  request.arrival = std::chrono::seconds(1);
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  const PressureReport report = scheduler_->Pressure(std::chrono::seconds(4));
  EXPECT_DOUBLE_EQ(report.kv_used, 0.25);
  EXPECT_DOUBLE_EQ(report.kv_promised, 0.25);
  EXPECT_DOUBLE_EQ(report.queue_length, 0.25);
  EXPECT_DOUBLE_EQ(report.oldest_wait_s, 3);
  EXPECT_EQ(report.running, 1);
  EXPECT_EQ(report.waiting, 1);
}

TEST_F(SchedulerTest, ArrivalsAndFirstTokensAreToldAsMeans) {
  Make(64);
  const auto at = [](double seconds) {
    return std::chrono::duration_cast<Instant>(std::chrono::duration<double>(seconds));
  };
  scheduler_->CountArrivals(6);
  Request request = MakeRequest(1, {.prompt = 3, .max_tokens = 9});
  request.arrival = at(1);
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  Step(at(1.5));
  EXPECT_NEAR(scheduler_->Pressure(at(1.5)).arrivals_per_s, 3, 1e-5) << "within two seconds";
  EXPECT_EQ(scheduler_->Pressure(at(1.5)).first_token_s, 0);
  Step(at(3.5));
  EXPECT_NEAR(scheduler_->Pressure(at(3.5)).arrivals_per_s, 3 / std::exp(1), 1e-5);
  EXPECT_NEAR(scheduler_->Pressure(at(3.5)).first_token_s, 0.2 * 2.5, 1e-9);
  RunToEnd(1);
  Submit(2, {.prompt = 3});
  EXPECT_EQ(scheduler_->Pressure(at(9)).first_token_s, 0) << "after a pause";
  scheduler_->CountArrivals(2000);
  Step(at(1003.5));
  EXPECT_NEAR(scheduler_->Pressure(at(1003.5)).arrivals_per_s, 2, 0.02) << "of a long pause";
}

TEST_F(SchedulerTest, APreemptedSequenceWaitsSinceThen) {
  Make(6, {.max_batch_tokens = 64, .max_sequences = 2, .reserve_output = 0});
  Submit(1, {.prompt = 4, .max_tokens = 12});
  Submit(2, {.prompt = 4, .max_tokens = 12});
  const auto at = [](int second) { return Instant(std::chrono::seconds(second)); };
  int second = 0;
  for (; second < 20 && scheduler_->stats().preemptions == 0; ++second) Step(at(second));
  --second;
  ASSERT_EQ(scheduler_->stats().preemptions, 1U);
  EXPECT_DOUBLE_EQ(scheduler_->Pressure(at(second + 2)).oldest_wait_s, 2);
}

TEST_F(SchedulerTest, RefusesThoseWhoWouldComeBehindALongWait) {
  Told told;
  policy_ = &told;
  Make(64, {.max_batch_tokens = 64, .max_sequences = 1});
  const auto at = [](int second) { return Instant(std::chrono::seconds(second)); };
  const auto submit = [&](RequestId id, int priority, int second) {
    Request request = MakeRequest(id, {.prompt = 4, .max_tokens = 30});
    request.priority = priority;
    request.arrival = at(second);
    ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  };
  submit(1, 9, 0);
  Step(at(0));
  submit(2, 1, 2);
  submit(3, -1, 1);
  submit(4, 3, 4);
  told.behind_s = 3;
  Step(at(3));
  EXPECT_EQ(scheduler_->stats().refused_priority, std::nullopt);
  Step(at(4));
  EXPECT_EQ(scheduler_->stats().refused_priority, -1);
  Step(at(5));
  EXPECT_EQ(scheduler_->stats().refused_priority, 1);
  for (const RequestId id : {2, 3, 4}) scheduler_->Cancel(id);
  EXPECT_EQ(scheduler_->stats().refused_priority, std::nullopt) << "nobody waits any more";
}

TEST_F(SchedulerTest, CrashesWhenCalledOutOfTurn) {
  Make(8);
  Submit(1, {.prompt = 3});
  scheduler_->Schedule(Instant{0}, &outputs_);
  EXPECT_DEATH(scheduler_->Schedule(Instant{0}, &outputs_), "while a batch is out");
  EXPECT_DEATH(scheduler_->Cancel(1), "cancelled while a batch is out");
  EXPECT_DEATH(scheduler_->Commit(StepResult{}, &outputs_), "0 results for 1 logit rows");
}

}  // namespace
}  // namespace espalier
