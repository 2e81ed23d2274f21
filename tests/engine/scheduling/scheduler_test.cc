// Scenarios of a few requests, told as the batches they give: `7[0,4)` are rows of a prefill chunk
// of request 7, `7@5` its decode row at position 5.
#include "engine/scheduling/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/puppet_executor.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr int kLayers = 2;
constexpr SiteWidths kWidths{.layers = kLayers, .heads = 2, .channels = 8};

struct Asked {
  int prompt = 1;
  int max_tokens = 4;
  int priority = 0;
  Instant deadline = kNever;
  int first = 100;  // token; each is one more than the one before
};

class SchedulerTest : public testing::Test {
 protected:
  // 8 tokens a step, and a pool of `pages` pages of 4 tokens in each of the two layers. Without
  // prefix_cache_ all is computed, though the prompts begin alike.
  void Make(int pages, SchedulerOptions options = {.max_batch_tokens = 8}) {
    options.prefix_cache = prefix_cache_;
    const KvGeometry geometry{
        .layers = kLayers, .pages = kLayers * pages, .page_tokens = 4, .context = 64};
    scheduler_.emplace(options, geometry, ladder_, policy_);
    puppet_.emplace(geometry, ladder_);
  }

  // A rung of fewer channels for decode rows.
  void AddNarrowRung() {
    Rung narrow = ladder_.rung(ladder_.size() - 1);
    narrow.decode.Keep(0, SiteKind::kChannels, 4);
    ASSERT_TRUE(ladder_.Append(narrow));
  }

  // A rung at four bits, and prefixes are shared.
  void AddPackedRung() {
    Rung packed = ladder_.rung(ladder_.size() - 1);
    packed.int4_kv = true;
    ASSERT_TRUE(ladder_.Append(packed));
    prefix_cache_ = true;
  }

  static Request MakeRequest(RequestId id, const Asked& asked) {
    Request request{.id = id, .priority = asked.priority, .deadline = asked.deadline};
    for (int i = 0; i < asked.prompt; ++i) request.prompt.push_back(asked.first + i);
    request.stop.max_tokens = asked.max_tokens;
    return request;
  }

  void Submit(RequestId id, const Asked& asked) {
    ASSERT_EQ(scheduler_->Submit(MakeRequest(id, asked)), absl::OkStatus());
  }

  // One step at `now`; what was told is in outputs_.
  std::string Step(Instant now = Instant{0}) {
    outputs_.clear();
    const Batch& batch = scheduler_->Schedule(now, &outputs_);
    std::string text;
    for (const BatchSpan& span : batch.spans) {
      if (!text.empty()) text += ' ';
      text += span.decode ? fmt::format("{}@{}", span.id, span.start)
                          : fmt::format("{}[{},{})", span.id, span.start, span.start + span.rows);
    }
    puppet_->PackPages(scheduler_->packings());
    if (!batch.empty()) {
      EXPECT_EQ(puppet_->Execute(batch, &result_), absl::OkStatus());
      scheduler_->Commit(result_, &outputs_);
    }
    scheduler_->CheckInvariants();
    return text;
  }

  // "id:reason" of what ended in the last step.
  std::vector<std::string> Ended() const {
    std::vector<std::string> ended;
    for (const SequenceOutput& output : outputs_) {
      if (output.finish == FinishReason::kNone) continue;
      ended.push_back(fmt::format("{}:{}", output.id, FinishReasonName(output.finish)));
    }
    return ended;
  }

  std::vector<int32_t> RunToEnd(RequestId id) {
    std::vector<int32_t> tokens;
    while (!scheduler_->idle()) {
      Step();
      for (const SequenceOutput& output : outputs_) {
        if (output.id != id) continue;
        for (const TokenResult& token : output.tokens) tokens.push_back(token.token);
      }
    }
    return tokens;
  }

  // Pages in use and pages kept for reuse, of one layer.
  std::string Pages() const {
    const SchedulerStats stats = scheduler_->stats();
    return fmt::format("{} + {}", stats.pages_used / kLayers, stats.pages_cached / kLayers);
  }

  bool prefix_cache_ = false;
  Ladder ladder_ = Ladder::DenseOnly(kWidths);
  FixedPolicy dense_{0};
  Policy* policy_ = &dense_;
  std::optional<Scheduler> scheduler_;
  std::optional<PuppetExecutor> puppet_;
  StepResult result_;
  std::vector<SequenceOutput> outputs_;
};

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

TEST_F(SchedulerTest, TheRungIsAllowedToldAndTakesNoPagesWhereItDropsABlock) {
  Rung dropped = ladder_.rung(0);
  for (KeepProfile* profile : {&dropped.prefill, &dropped.decode}) {
    profile->Keep(1, SiteKind::kHeads, 0);
  }
  ASSERT_TRUE(ladder_.Append(dropped));
  FixedPolicy hard(1);
  policy_ = &hard;
  Make(8);
  Submit(1, {.prompt = 5});
  Request request = MakeRequest(2, {.prompt = 3});
  request.bounds.never = true;
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  EXPECT_EQ(Step(), "1[0,5) 2[0,3)");
  EXPECT_EQ(outputs_.at(0).rung, 1);
  EXPECT_EQ(outputs_.at(1).rung, 0);
  EXPECT_EQ(scheduler_->stats().pages_used, 2 + kLayers);
}

// Wants what it is told.
class Told final : public Policy {
 public:
  void Observe(const PressureReport& report, const Ladder&) override { seen = report; }
  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, rung);
  }
  std::string_view name() const override { return "told"; }
  std::string_view reason() const override { return why; }

  double refuses_behind_s() const override { return behind_s; }
  int hardest_served() const override { return hardest; }
  void Chose(uint64_t request, const RequestTraits& traits, int at) override {
    chosen.push_back(
        fmt::format("{} at {} of {:b}, priority {}", request, at, traits.allowed, traits.priority));
  }

  int rung = 0;
  int hardest = kMostRungs - 1;
  std::string_view why = "told so";
  double behind_s = 1e9;
  std::vector<std::string> chosen;
  PressureReport seen;
};

TEST_F(SchedulerTest, RunningSequencesMoveAndNeverGetBackWhatTheyShed) {
  Rung narrow = ladder_.rung(0);
  for (KeepProfile* profile : {&narrow.prefill, &narrow.decode}) {
    profile->Keep(0, SiteKind::kChannels, 4);
  }
  ASSERT_TRUE(ladder_.Append(narrow));
  Rung dropped = narrow;
  for (KeepProfile* profile : {&dropped.prefill, &dropped.decode}) {
    profile->Keep(1, SiteKind::kHeads, 0);
  }
  ASSERT_TRUE(ladder_.Append(dropped));
  Told told;
  policy_ = &told;
  Make(40, {.max_batch_tokens = 32});
  Submit(1, {.prompt = 3, .max_tokens = 20});
  Request named = MakeRequest(2, {.prompt = 3, .max_tokens = 20});
  named.bounds.rung = 1;
  ASSERT_EQ(scheduler_->Submit(named), absl::OkStatus());
  Request bounded = MakeRequest(3, {.prompt = 3, .max_tokens = 20});
  bounded.bounds.max_quality_loss = 0;  // the ladder has no prices: all rungs are free
  bounded.bounds.never = true;
  ASSERT_EQ(scheduler_->Submit(bounded), absl::OkStatus());
  const auto rungs = [&](int wanted) {
    told.rung = wanted;
    Step();
    std::string text;
    for (const SequenceOutput& output : outputs_) text += fmt::format("{} ", output.rung);
    return text + fmt::format("{}", scheduler_->stats().pages_used);
  };
  const int each = kLayers;
  EXPECT_EQ(rungs(0), fmt::format("0 1 0 {}", 3 * each));
  EXPECT_EQ(rungs(1), fmt::format("1 1 0 {}", 3 * each));
  EXPECT_EQ(rungs(0), fmt::format("0 1 0 {}", 6 * each)) << "channels go both ways";
  EXPECT_EQ(rungs(2), fmt::format("2 1 0 {}", 6 * each - 2));
  EXPECT_EQ(rungs(0), fmt::format("2 1 0 {}", 6 * each - 2)) << "a block does not";
  EXPECT_EQ(outputs_.at(0).reason, "told so");
  EXPECT_EQ(scheduler_->stats().rung_moves, 3);
  EXPECT_EQ(scheduler_->stats().wanted_rung, 0);
}

TEST_F(SchedulerTest, FourBitsHalveThePagesOfWhoRunsAndNeverGoBack) {
  Told told;
  policy_ = &told;
  AddPackedRung();
  Make(40, {.max_batch_tokens = 64});
  Submit(1, {.prompt = 21, .max_tokens = 20});  // six pages of four in each layer
  Step();
  Submit(2, {.prompt = 18, .max_tokens = 20});  // four of them the first one's, and one of its own
  Step();
  EXPECT_EQ(scheduler_->stats().pages_used, (6 + 1) * kLayers);
  told.rung = 1;
  Submit(3, {.prompt = 21, .max_tokens = 2});
  EXPECT_EQ(Step(), "1@22 2@18 3[0,21)") << "nothing at fewer bits is there to be shared";
  // Two pages each are copies of four shared ones, the third is made of a shared and an own one, or
  // of an own one alone.
  EXPECT_EQ(scheduler_->stats().pages_used, (3 + 3 + 3) * kLayers);
  EXPECT_EQ(scheduler_->stats().pages_cached, 5 * kLayers) << "those that were shared";
  EXPECT_EQ(puppet_->packings(), (3 + 3) * kLayers);
  told.rung = 0;
  EXPECT_EQ(Step(), "1@23 2@19 3@21");
  EXPECT_EQ(scheduler_->stats().pages_used, (3 + 3) * kLayers) << "the third has ended";
  EXPECT_EQ(outputs_.at(0).rung, 1);
  Submit(4, {.prompt = 21, .max_tokens = 2});
  EXPECT_EQ(Step(), "1@24 2@20 4[20,21)") << "who comes now is served in full";
}

TEST_F(SchedulerTest, WhoHasNoPageForACopyStaysAtItsBits) {
  Told told;
  policy_ = &told;
  AddPackedRung();
  Make(6, {.max_batch_tokens = 64, .reserve_output = 0});
  Submit(1, {.prompt = 16, .max_tokens = 8});
  Step();
  Submit(2, {.prompt = 16, .max_tokens = 8});
  Step();
  Step();
  ASSERT_EQ(scheduler_->stats().pages_free, 0) << "four pages are shared, each has one of its own";
  told.rung = 1;
  Step();
  EXPECT_EQ(outputs_.at(0).rung, 0);
  EXPECT_EQ(puppet_->packings(), 0);
}

TEST_F(SchedulerTest, LessMemoryDropsBlocksBeforeItPreempts) {
  Rung dropped = ladder_.rung(0);
  for (KeepProfile* profile : {&dropped.prefill, &dropped.decode}) {
    profile->Keep(1, SiteKind::kHeads, 0);
  }
  ASSERT_TRUE(ladder_.Append(dropped));
  class Sheds final : public Policy {
   public:
    void Observe(const PressureReport& report, const Ladder&) override {
      rung_ = report.kv_used > 1 ? 1 : rung_;
    }
    int ChooseRung(const RequestTraits& traits) const override {
      return HardestIn(traits.allowed, rung_);
    }
    std::string_view name() const override { return "sheds"; }

   private:
    int rung_ = 0;
  };
  Sheds sheds;
  policy_ = &sheds;
  Make(12, {.max_batch_tokens = 32});
  for (RequestId id = 1; id <= 3; ++id) Submit(id, {.prompt = 9, .max_tokens = 3});
  Step();
  EXPECT_EQ(scheduler_->stats().pages_used, 3 * 3 * kLayers);
  const auto limit = [&](int pages) {
    const auto moves = scheduler_->LimitPages(pages, Instant{0});
    puppet_->PackPages(scheduler_->packings());
    puppet_->FitPages(moves, scheduler_->pages_total());
    scheduler_->CheckInvariants();
    return fmt::format("{} {} {}", scheduler_->pages_total(), scheduler_->stats().pages_used,
                       scheduler_->stats().preemptions);
  };
  EXPECT_EQ(limit(18), "18 18 0");
  EXPECT_EQ(limit(12), "12 9 0") << "one of two layers goes";
  EXPECT_EQ(limit(7), "7 6 1") << "the youngest";
  EXPECT_EQ(limit(0), "3 3 2") << "what the first needs alone, at its rung";
  const absl::Status refused = scheduler_->Submit(MakeRequest(9, {.prompt = 12, .max_tokens = 1}));
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      std::string(refused.message()),
      HasSubstr("12 + 1 tokens take 4 KV pages at rung 1, and there may be 0 at present of 24"));
  std::vector<int32_t> answer = puppet_->Answer(MakeRequest(3, {.prompt = 9, .max_tokens = 3}));
  answer.erase(answer.begin());  // told by the first step
  EXPECT_EQ(RunToEnd(3), answer);
  EXPECT_EQ(limit(0), "0 0 2") << "nobody runs";
  EXPECT_EQ(limit(99), "24 0 2");
}

TEST_F(SchedulerTest, WhatFitsAtSomeRungIsServedAtTheMildestSuch) {
  Rung narrow = ladder_.rung(0);
  narrow.decode.Keep(0, SiteKind::kChannels, 4);
  ASSERT_TRUE(ladder_.Append(narrow));
  Rung packed = narrow;
  packed.int4_kv = true;
  ASSERT_TRUE(ladder_.Append(packed));
  narrow = packed;
  narrow.decode.Keep(1, SiteKind::kChannels, 4);
  ASSERT_TRUE(ladder_.Append(narrow));
  Told told;
  policy_ = &told;
  Make(8, {.max_batch_tokens = 32});
  scheduler_->LimitPages(4 * kLayers, Instant{0});
  Request request = MakeRequest(1, {.prompt = 20, .max_tokens = 4});  // 6 pages a layer, or 3
  const auto refused = [&] { return std::string(scheduler_->Submit(request).message()); };
  constexpr char kMissing[] =
      "20 + 4 tokens take 12 KV pages at rung 0, and there may be 8 at present of 16";
  request.bounds.never = true;
  EXPECT_THAT(refused(), HasSubstr(kMissing));
  request.bounds.never = false;
  told.hardest = 0;
  EXPECT_THAT(refused(), HasSubstr(kMissing)) << "the policy never goes beyond";
  EXPECT_EQ(scheduler_->LeastPages(request), 12);
  told.hardest = 2;
  EXPECT_EQ(scheduler_->LeastPages(request), 6);
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  scheduler_->LimitPages(0, Instant{0});
  EXPECT_EQ(scheduler_->pages_total(), 0) << "nobody runs";
  ASSERT_TRUE(scheduler_->ServeRungs(0b1100));
  Step();
  EXPECT_EQ(scheduler_->pages_total(), 3 * kLayers) << "of its rungs, the one of least KV";
  EXPECT_EQ(outputs_.at(0).rung, 2) << "the policy's is 0";
  EXPECT_EQ(outputs_.at(0).reason, "memory") << "the others' weights would be of no use";
  RunToEnd(1);
  EXPECT_EQ(scheduler_->stats().preemptions, 0u);
}

TEST_F(SchedulerTest, WhoHoldsMoreThanThereMayBeMovesToLessKvAndHandsNothingOn) {
  AddPackedRung();
  prefix_cache_ = false;
  Told told;
  policy_ = &told;
  Make(12, {.max_batch_tokens = 32, .reserve_output = 0});
  Submit(1, {.prompt = 12, .max_tokens = 20});  // 8 pages a layer, or 4
  Step();
  Step();  // and now 4, or 2
  const auto limit = [&](int pages) {
    const auto moves = scheduler_->LimitPages(pages * kLayers, Instant{0});
    puppet_->PackPages(scheduler_->packings());
    puppet_->FitPages(moves, scheduler_->pages_total());
    scheduler_->CheckInvariants();
    return fmt::format("{} of {}", scheduler_->stats().pages_used / kLayers,
                       scheduler_->pages_total() / kLayers);
  };
  EXPECT_EQ(limit(4), "4 of 8") << "what it holds may be";
  Submit(2, {.prompt = 3, .max_tokens = 1});
  EXPECT_EQ(Step(), "1@13") << "the rest of its eight are nobody else's";
  told.hardest = 0;
  EXPECT_EQ(limit(3), "4 of 8") << "the policy lets nobody have four bits";
  told.hardest = 1;
  told.seen = {};
  EXPECT_EQ(limit(3), "2 of 4");
  EXPECT_EQ(told.seen.kv_used, 0) << "the policy was not asked for more";
  EXPECT_EQ(Step(), "1@14 2[0,3)");
  EXPECT_EQ(outputs_.at(0).rung, 1);
  EXPECT_EQ(outputs_.at(0).reason, "memory");
  const absl::Status refused = scheduler_->Submit(MakeRequest(3, {.prompt = 12, .max_tokens = 20}));
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("take 8 KV pages at rung 1, and there may be 6"));
  RunToEnd(1);
  EXPECT_EQ(limit(3), "0 of 3");
  EXPECT_EQ(scheduler_->stats().preemptions, 0u);
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

TEST_F(SchedulerTest, RowsAreCountedByHowTheirChannelsWereChosen) {
  Rung decodes_narrow = ladder_.rung(0), narrow = ladder_.rung(0);
  decodes_narrow.decode.Keep(0, SiteKind::kChannels, 4);
  for (KeepProfile* profile : {&narrow.prefill, &narrow.decode}) {
    profile->Keep(0, SiteKind::kChannels, 4);
  }
  ASSERT_TRUE(ladder_.Append(decodes_narrow));
  ASSERT_TRUE(ladder_.Append(narrow));
  FixedPolicy hard(2);
  policy_ = &hard;
  Make(8, {.max_batch_tokens = 12});
  for (int rung = 0; rung < 3; ++rung) {
    Request request = MakeRequest(rung, {.prompt = 3 + rung, .max_tokens = 3});
    request.bounds.rung = rung;
    ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  }
  result_.probe.ahead = true;
  EXPECT_EQ(Step(), "0[0,3) 1[0,4) 2[0,5)");
  result_.probe.ahead = false;
  Step();
  result_.probe.ahead = true;  // of others' prompts: decode rows meet what was there
  Step();
  EXPECT_EQ(outputs_.at(0).stages, (StageRows{.full = 5}));
  EXPECT_EQ(outputs_.at(1).stages, (StageRows{.full = 4, .history = 2}));
  EXPECT_EQ(outputs_.at(2).stages, (StageRows{.probed = 5, .history = 2}));
  EXPECT_EQ(scheduler_->stats().stages, (StageRows{.full = 9, .probed = 5, .history = 4}));
}

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

TEST_F(SchedulerTest, ToldIsWhatARequestIsChosenByAndWhatBecomesOfIt) {
  AddNarrowRung();
  Told told;
  policy_ = &told;
  Make(64);
  Submit(1, {.prompt = 3, .priority = 5});
  Request named = MakeRequest(2, {.prompt = 2});
  named.bounds.rung = 1;
  ASSERT_EQ(scheduler_->Submit(named), absl::OkStatus());
  Step();
  told.rung = 1;
  Step();
  EXPECT_THAT(told.chosen, ElementsAre("1 at 0 of 11, priority 5", "1 at 1 of 11, priority 5"));
}

TEST_F(SchedulerTest, TheReasonIsThatOfTheLastTimeItWasPruned) {
  AddNarrowRung();
  Told told;
  policy_ = &told;
  Make(64);
  Submit(1, {.prompt = 3, .max_tokens = 9});
  Step();
  EXPECT_EQ(outputs_.at(0).reason, "told so");
  told.rung = 1;
  told.why = "pressed";
  Step();
  EXPECT_EQ(outputs_.at(0).reason, "pressed");
  told.rung = 0;
  told.why = "none";
  Step();
  EXPECT_EQ(outputs_.at(0).reason, "pressed");
}

TEST_F(SchedulerTest, WhoIsNotPrunedHasNoReason) {
  AddNarrowRung();
  Told told;
  told.rung = 1;
  policy_ = &told;
  Make(64);
  Request request = MakeRequest(1, {.prompt = 3});
  request.bounds.never = true;
  ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  Submit(2, {.prompt = 3});
  Step();
  EXPECT_EQ(outputs_.at(0).reason, "none");
  EXPECT_EQ(outputs_.at(1).reason, "told so");
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

TEST_F(SchedulerTest, BoundsAreHeldAgainstWhatRungsAreTakenToLoseNow) {
  Rung narrow = ladder_.rung(0);
  narrow.decode.Keep(0, SiteKind::kChannels, 4);
  narrow.price.quality_loss_nats = 0.1;
  ASSERT_TRUE(ladder_.Append(narrow));
  FixedPolicy hardest(1);
  policy_ = &hardest;
  Make(64);
  const auto served = [&](RequestId id) {
    Request request = MakeRequest(id, {.prompt = 3, .max_tokens = 1});
    request.bounds.max_quality_loss = 0.15;
    EXPECT_EQ(scheduler_->Submit(request), absl::OkStatus());
    Step();
    return std::pair(outputs_.at(0).rung, outputs_.at(0).rung_loss);
  };
  EXPECT_EQ(served(1), std::pair(1, 0.1));
  scheduler_->SetLosses(std::vector<double>{9, 0.2});
  EXPECT_EQ(served(2), std::pair(0, 0.0)) << "it loses more than the bound; rung 0 loses nothing";
  scheduler_->SetLosses(std::vector<double>{0, 0.12});
  EXPECT_EQ(served(3), std::pair(1, 0.12));
  Submit(4, {.prompt = 3});
  EXPECT_DEATH(scheduler_->SetLosses(std::vector<double>{0, 0.1}), "2 losses of 2 rungs");
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
