// At which rung: policy, bounds, memory; and what becomes of pages as a sequence moves.
#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/engine/scheduling/scheduler_scenes.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

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

TEST_F(SchedulerTest, RowsAreCountedByHowTheirChannelsWereChosen) {
  Rung decodes_narrow = ladder_.rung(0), narrow = ladder_.rung(0);
  decodes_narrow.decode.Keep(0, SiteKind::kChannels, 4);
  for (KeepProfile* profile : {&narrow.prefill, &narrow.decode}) {
    profile->Keep(0, SiteKind::kChannels, 4);
  }
  Rung drops = narrow;
  for (KeepProfile* profile : {&drops.prefill, &drops.decode}) {
    profile->Keep(0, SiteKind::kChannels, 0);
  }
  ASSERT_TRUE(ladder_.Append(decodes_narrow));
  ASSERT_TRUE(ladder_.Append(narrow));
  ASSERT_TRUE(ladder_.Append(drops));
  FixedPolicy hard(3);
  policy_ = &hard;
  Make(16, {.max_batch_tokens = 18});
  for (int rung = 0; rung < 4; ++rung) {
    Request request = MakeRequest(rung, {.prompt = 3 + rung, .max_tokens = 4});
    request.bounds.rung = rung;
    ASSERT_EQ(scheduler_->Submit(request), absl::OkStatus());
  }
  result_.probe.ahead = true;
  EXPECT_EQ(Step(), "0[0,3) 1[0,4) 2[0,5) 3[0,6)");
  result_.probe.ahead = false;
  Step();
  result_.probe.ahead = true;  // of others' prompts: decode rows meet what was there
  Step();
  result_.probe = {.whole = true};  // what is dropped stays away
  Step();
  EXPECT_EQ(outputs_.at(0).stages, (StageRows{.full = 6}));
  EXPECT_EQ(outputs_.at(1).stages, (StageRows{.full = 5, .history = 2}));
  EXPECT_EQ(outputs_.at(2).stages, (StageRows{.full = 1, .probed = 5, .history = 2}));
  EXPECT_EQ(outputs_.at(3).stages, (StageRows{.history = 9})) << "nothing of it was ranked";
  EXPECT_EQ(scheduler_->stats().stages, (StageRows{.full = 12, .probed = 5, .history = 13}));
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

}  // namespace
}  // namespace espalier
