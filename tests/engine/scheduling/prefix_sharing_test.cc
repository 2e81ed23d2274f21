// What is found of a prompt in the prefix cache, and who may share which pages.
#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/engine/scheduling/scheduler_scenes.h"

namespace espalier {
namespace {

using testing::ElementsAre;

class PrefixCacheTest : public SchedulerTest {
 protected:
  PrefixCacheTest() { prefix_cache_ = true; }

  // Runs a request alone; its pages stay.
  std::vector<int32_t> Answer(RequestId id, const Asked& asked) {
    Submit(id, asked);
    return RunToEnd(id);
  }
};

TEST_F(PrefixCacheTest, SharedPagesOfADroppedBlockStayItsOwnUntilItEnds) {
  Rung dropped = ladder_.rung(0);
  for (KeepProfile* profile : {&dropped.prefill, &dropped.decode}) {
    profile->Keep(1, SiteKind::kHeads, 0);
  }
  ASSERT_TRUE(ladder_.Append(dropped));
  for (const int prompt : {8, 16}) {
    Told told;
    policy_ = &told;
    Make(8, {.max_batch_tokens = 32});
    const Asked asked{.prompt = prompt, .max_tokens = 16};
    Submit(1, asked);
    Step();
    told.rung = 1;
    Step();
    const int shared = prompt / 4, all = (prompt + 16) / 4;
    scheduler_->LimitPages(0, Instant{0});
    EXPECT_EQ(scheduler_->pages_total(), shared + all)
        << "both layers of these, and one of the rest";
    std::vector<int32_t> answer = puppet_->Answer(MakeRequest(1, asked));
    answer.erase(answer.begin(), answer.begin() + 2);  // told by the first steps
    EXPECT_EQ(RunToEnd(1), answer);
    EXPECT_EQ(scheduler_->stats().preemptions, 0u);
  }
}

TEST_F(PrefixCacheTest, ARequestStartsBehindThePagesAnotherStillUses) {
  Make(16);
  Submit(1, {.prompt = 10});
  EXPECT_EQ(Step(), "1[0,8)");
  Submit(2, {.prompt = 11});
  EXPECT_EQ(Step(), "1[8,10) 2[8,11)");
  EXPECT_EQ(outputs_.at(0).cached_tokens, 0);
  EXPECT_EQ(outputs_.at(1).cached_tokens, 8);
  EXPECT_EQ(Pages(), "4 + 0");  // two together, one each
  RunToEnd(1);
  EXPECT_EQ(Pages(), "0 + 4");  // 13 and 14 tokens computed, of which the first 8 are the same
  EXPECT_EQ(scheduler_->stats().prefix_queries, 21u);
  EXPECT_EQ(scheduler_->stats().prefix_hits, 8u);
}

TEST_F(PrefixCacheTest, TheLastTokenOfAPromptIsAlwaysComputed) {
  Make(16);
  Answer(1, {.prompt = 8, .max_tokens = 1});
  EXPECT_EQ(Pages(), "0 + 2");
  Submit(2, {.prompt = 8, .max_tokens = 1});
  EXPECT_EQ(Step(), "2[4,8)");
  EXPECT_EQ(Pages(), "0 + 2");  // its second page was the same again
  Submit(3, {.prompt = 4, .max_tokens = 1});
  EXPECT_EQ(Step(), "3[0,4)");
  Submit(4, {.prompt = 9, .max_tokens = 1});
  EXPECT_EQ(Step(), "4[8,9)");
}

TEST_F(PrefixCacheTest, WhatTwoComputedInOneStepIsKeptOnce) {
  Make(16, {.max_batch_tokens = 32});
  Submit(1, {.prompt = 10});
  Submit(2, {.prompt = 10});
  EXPECT_EQ(Step(), "1[0,10) 2[0,10)");
  EXPECT_EQ(Pages(), "4 + 0");
  RunToEnd(2);
  EXPECT_EQ(scheduler_->stats().prefix_hits, 0u);
}

TEST_F(PrefixCacheTest, TheNextTurnOfAChatFindsTheAnswerToo) {
  Make(16);
  const Asked asked{.prompt = 6, .max_tokens = 7};
  const std::vector<int32_t> answer = Answer(1, asked);
  Request turn = MakeRequest(2, asked);
  turn.prompt.insert(turn.prompt.end(), answer.begin(), answer.end());
  turn.prompt.push_back(5);
  ASSERT_EQ(scheduler_->Submit(turn), absl::OkStatus());
  EXPECT_EQ(Step(), "2[12,14)");  // the last one drawn was never computed
}

TEST_F(PrefixCacheTest, TheLeastRecentlyUsedGoFirstAndLeavesBeforeWhatTheyStandOn) {
  Make(5);
  Answer(1, {.prompt = 8, .max_tokens = 1, .first = 100});
  Answer(2, {.prompt = 8, .max_tokens = 1, .first = 200});
  EXPECT_EQ(Pages(), "0 + 4");
  Answer(3, {.prompt = 8, .max_tokens = 1, .first = 300});  // one page is free, one has to go
  EXPECT_EQ(Pages(), "0 + 5");
  EXPECT_EQ(scheduler_->stats().prefix_evicted_pages, uint64_t{kLayers});
  Submit(4, {.prompt = 12, .max_tokens = 1, .first = 100});
  EXPECT_EQ(Step(), "4[4,12)");  // and it takes the two of 2
  Submit(5, {.prompt = 9, .max_tokens = 1, .first = 300});
  EXPECT_EQ(Step(), "5[8,9)");
}

TEST_F(PrefixCacheTest, ARequestMayTakeThePlaceOfTheEndOfItsOwnPrefix) {
  Make(4);
  Answer(1, {.prompt = 15, .max_tokens = 1});
  Answer(2, {.prompt = 4, .max_tokens = 1, .first = 300});
  EXPECT_EQ(Pages(), "0 + 4");
  Request request = MakeRequest(3, {.prompt = 15, .max_tokens = 1});
  std::fill(request.prompt.begin() + 8, request.prompt.end(), 7);
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  EXPECT_EQ(Step(), "3[8,15)");  // in the place of 1's third page and of 2's
  EXPECT_EQ(scheduler_->stats().prefix_evicted_pages, uint64_t{2 * kLayers});
  EXPECT_EQ(Pages(), "0 + 3");
}

TEST_F(PrefixCacheTest, WhatACancelledPrefillComputedStays) {
  Make(8);
  Submit(1, {.prompt = 20});
  EXPECT_EQ(Step(), "1[0,8)");
  EXPECT_TRUE(scheduler_->Cancel(1));
  scheduler_->CheckInvariants();
  EXPECT_EQ(Pages(), "0 + 2");
  Submit(2, {.prompt = 20});
  EXPECT_EQ(Step(), "2[8,16)");
}

TEST_F(PrefixCacheTest, WhatWasNotComputedIsNotShared) {
  Make(8);
  Submit(1, {.prompt = 8});
  ASSERT_FALSE(scheduler_->Schedule(Instant{0}, &outputs_).empty());
  scheduler_->Discard();
  EXPECT_TRUE(scheduler_->Cancel(1));
  EXPECT_EQ(Pages(), "0 + 0");
}

TEST_F(PrefixCacheTest, APreemptedSequenceComesBackToWhatIsLeftOfItsPages) {
  Make(5, {.max_batch_tokens = 32, .reserve_output = 0});
  const Asked asked{.prompt = 12, .max_tokens = 4};
  Submit(1, {.prompt = 8, .max_tokens = 4, .first = 200});
  Submit(2, asked);
  EXPECT_EQ(Step(), "1[0,8) 2[0,12)");
  std::vector<int32_t> answer = {outputs_.at(1).tokens.at(0).token};
  EXPECT_EQ(Step(), "1@8");  // the third page of 2 goes
  EXPECT_EQ(Pages(), "3 + 2");
  EXPECT_EQ(Step(), "1@9");
  EXPECT_EQ(Step(), "1@10");
  EXPECT_THAT(Ended(), ElementsAre("1:length"));
  EXPECT_EQ(Step(), "2[8,13)");
  EXPECT_EQ(outputs_.at(0).cached_tokens, 0);  // of the prompt, when it first came
  EXPECT_EQ(scheduler_->stats().recomputed_tokens, 4u);
  EXPECT_EQ(scheduler_->stats().prefix_queries, 20u);
  answer.push_back(outputs_[0].tokens.at(0).token);
  for (const int32_t token : RunToEnd(2)) answer.push_back(token);
  EXPECT_EQ(answer, puppet_->Answer(MakeRequest(2, asked)));
}

TEST_F(PrefixCacheTest, APreemptedSequenceThatLostNothingDrawsAtOnce) {
  Make(5, {.max_batch_tokens = 32, .reserve_output = 0});
  Submit(1, {.prompt = 7, .max_tokens = 2, .first = 200});
  Submit(2, {.prompt = 12, .max_tokens = 2});
  EXPECT_EQ(Step(), "1[0,7) 2[0,12)");
  EXPECT_EQ(Step(), "1@7");  // 2 enters a page and finds none
  EXPECT_EQ(Pages(), "0 + 5");
  EXPECT_EQ(Step(), "2[12,13)");
  EXPECT_THAT(Ended(), ElementsAre("2:length"));
  EXPECT_EQ(scheduler_->stats().preemptions, 1u);
  EXPECT_EQ(scheduler_->stats().recomputed_tokens, 0u);
}

TEST_F(PrefixCacheTest, AScoreComputesWhatItTellsAndLeavesItsPages) {
  Make(8);
  Request score = MakeRequest(1, {.prompt = 10, .max_tokens = 0});
  score.prompt_logprobs = true;
  ASSERT_EQ(scheduler_->Submit(score), absl::OkStatus());
  RunToEnd(1);
  EXPECT_EQ(Pages(), "0 + 2");
  score.id = 2;
  ASSERT_EQ(scheduler_->Submit(score), absl::OkStatus());
  EXPECT_EQ(Step(), "2[0,8)");
  EXPECT_EQ(outputs_.at(0).prompt_scores.size(), 8u);
  EXPECT_EQ(Step(), "2[8,10)");
  EXPECT_EQ(outputs_.at(0).cached_tokens, 0);
  EXPECT_EQ(scheduler_->stats().prefix_queries, 0u);
  Submit(3, {.prompt = 10});
  EXPECT_EQ(Step(), "3[8,10)");
}

TEST_F(PrefixCacheTest, RungsShareNothing) {
  Rung dropped = ladder_.rung(0);
  for (KeepProfile* profile : {&dropped.prefill, &dropped.decode}) {
    profile->Keep(1, SiteKind::kHeads, 0);
  }
  dropped.decode.Keep(0, SiteKind::kChannels, 4);
  ASSERT_TRUE(ladder_.Append(dropped));
  FixedPolicy hard(1);
  policy_ = &hard;
  Make(8);
  Answer(1, {.prompt = 6, .max_tokens = 4});  // its second page has rows of the decode profile
  EXPECT_EQ(scheduler_->stats().pages_cached, 1);
  Request dense = MakeRequest(2, {.prompt = 6});
  dense.bounds.never = true;
  ASSERT_EQ(scheduler_->Submit(dense), absl::OkStatus());
  EXPECT_EQ(Step(), "2[0,6)");
  Submit(3, {.prompt = 6});
  EXPECT_EQ(Step(), "2@6 3[4,6)");
}

TEST_F(PrefixCacheTest, ThePagesInUseAreNotPromisedTwice) {
  for (const auto& [pages, running] : {std::pair(6, 1), std::pair(7, 2)}) {
    Make(pages, {.max_batch_tokens = 16, .reserve_output = 1});
    Submit(1, {.prompt = 16, .max_tokens = 4});  // 5 pages of each layer
    Step();
    Submit(2, {.prompt = 16, .max_tokens = 4});  // 3 of them, and 2 of its own
    Step();
    EXPECT_EQ(scheduler_->stats().running, running) << pages;
    RunToEnd(1);
    EXPECT_EQ(scheduler_->stats().preemptions, 0u);
  }
}

TEST_F(PrefixCacheTest, KeptPagesAreNoPressure) {
  Make(4);
  Answer(1, {.prompt = 12, .max_tokens = 4});
  EXPECT_EQ(Pages(), "0 + 3");
  EXPECT_EQ(scheduler_->Pressure(Instant{0}).kv_used, 0);
  Submit(2, {.prompt = 16 - 4, .max_tokens = 4, .first = 300});
  EXPECT_EQ(Step(), "2[0,8)");
}

}  // namespace
}  // namespace espalier
