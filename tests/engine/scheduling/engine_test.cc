#include "engine/engine.h"

#include <set>
#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/puppet_executor.h"

namespace espalier {
namespace {

constexpr KvGeometry kGeometry{.layers = 2, .pages = 32, .page_tokens = 4, .context = 64};

class EngineTest : public testing::Test {
 protected:
  static Request MakeRequest(RequestId id, int prompt, int max_tokens) {
    Request request{.id = id, .prompt = std::vector<int32_t>(prompt, 5)};
    request.stop.max_tokens = max_tokens;
    return request;
  }

  const Ladder ladder_ = Ladder::DenseOnly({.layers = 2, .heads = 1, .channels = 1});
  FixedPolicy policy_{0};
  PuppetExecutor puppet_{kGeometry, ladder_};
  Engine engine_{{.max_batch_tokens = 8}, kGeometry, ladder_, &puppet_, &policy_};
};

TEST_F(EngineTest, AStepReportsRowsOutputsAndStats) {
  ASSERT_EQ(engine_.Submit(MakeRequest(1, 3, 2)), absl::OkStatus());
  ASSERT_EQ(engine_.Submit(MakeRequest(2, 9, 2)), absl::OkStatus());
  absl::StatusOr<const StepReport*> report = engine_.Step(Instant{1});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ((*report)->prefill_rows, 8);
  EXPECT_EQ((*report)->decode_rows, 0);
  EXPECT_EQ((*report)->sequences, 2);
  ASSERT_EQ((*report)->outputs.size(), 1u);  // 2 is still in its prompt
  EXPECT_EQ((*report)->outputs[0].tokens[0].token, puppet_.Answer(MakeRequest(1, 3, 2))[0]);
  EXPECT_EQ((*report)->outputs[0].first_scheduled, Instant{1});
  EXPECT_EQ((*report)->stats.running, 2);
  EXPECT_EQ((*report)->stats.pages_used, 8);

  report = engine_.Step(Instant{2});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ((*report)->prefill_rows, 4);
  EXPECT_EQ((*report)->decode_rows, 1);
  EXPECT_EQ((*report)->outputs[0].finish, FinishReason::kLength);
  EXPECT_EQ((*report)->stats.running, 1);
}

TEST_F(EngineTest, AnIdleStepCallsNoExecutor) {
  const absl::StatusOr<const StepReport*> report = engine_.Step(Instant{1});
  ASSERT_TRUE(report.ok());
  EXPECT_FALSE((*report)->did_work());
  EXPECT_EQ(puppet_.steps(), 0);
  EXPECT_TRUE(engine_.idle());
}

TEST_F(EngineTest, AnExpiryIsReportedThoughNothingIsComputed) {
  Request request = MakeRequest(1, 3, 2);
  request.deadline = Instant{5};
  ASSERT_EQ(engine_.Submit(request), absl::OkStatus());
  const absl::StatusOr<const StepReport*> report = engine_.Step(Instant{5});
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE((*report)->did_work());
  EXPECT_EQ((*report)->outputs.at(0).finish, FinishReason::kDeadline);
  EXPECT_EQ(puppet_.steps(), 0);
}

TEST_F(EngineTest, ALostDeviceIsAnErrorAndLeavesTheBooksInOrder) {
  ASSERT_EQ(engine_.Submit(MakeRequest(1, 3, 4)), absl::OkStatus());
  puppet_.FailFrom(1);
  ASSERT_TRUE(engine_.Step(Instant{1}).ok());
  EXPECT_EQ(engine_.Step(Instant{2}).status().code(), absl::StatusCode::kUnavailable);
  engine_.scheduler().CheckInvariants();
  EXPECT_TRUE(engine_.Cancel(1));
  EXPECT_TRUE(engine_.idle());
}

// Weights in parts, each worth some pages to who needs none of its rungs.
class Weighty final : public Executor {
 public:
  struct Part {
    RungSet users = 0;
    int pages = 0;
    bool in_memory = true;
  };

  Weighty(const Ladder& ladder, std::vector<Part> parts)
      : puppet_(kGeometry, ladder), parts_(std::move(parts)) {}

  absl::Status Execute(const Batch& batch, StepResult* result) override {
    for (const BatchSpan& span : batch.spans) {
      for (const Part& part : parts_) {
        EXPECT_TRUE(part.in_memory || (part.users >> span.rung & 1) == 0)
            << "request " << span.id << " at " << span.rung;
      }
    }
    return puppet_.Execute(batch, result);
  }
  void PackPages(std::span<const PagePacking> packings) override { puppet_.PackPages(packings); }
  void FitPages(std::span<const std::pair<int32_t, int32_t>> moves, int pages) override {
    puppet_.FitPages(moves, pages);
  }
  int ReleasablePages(RungSet served) const override {
    int pages = 0;
    for (const Part& part : parts_) pages += (part.users & served) == 0 ? part.pages : 0;
    return pages;
  }
  // One part comes back, or all.
  absl::StatusOr<WeightsFit> FitWeights(RungSet served, bool at_once) override {
    if (lost_) return absl::DataLossError("the file has changed");
    WeightsFit fit{.seconds = 0.25};
    int returns = 0;
    for (Part& part : parts_) {
      const bool wanted = (part.users & served) != 0;
      if (wanted && !part.in_memory && ++returns > 1 && !at_once) {
        fit.done = false;
      } else {
        part.in_memory = wanted;
      }
    }
    return fit;
  }
  void Lose() { lost_ = true; }
  int pages_in_memory() const {
    int pages = 0;
    for (const Part& part : parts_) pages += part.in_memory ? part.pages : 0;
    return pages;
  }

 private:
  PuppetExecutor puppet_;
  std::vector<Part> parts_;
  bool lost_ = false;
};

// Chooses as told.
class Told final : public Policy {
 public:
  explicit Told(int told) : rung(told) {}
  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, rung);
  }
  std::string_view name() const override { return "told"; }
  std::string_view reason() const override { return "told so"; }

  int rung;
};

class WeightsTest : public EngineTest {
 protected:
  static constexpr SiteWidths kWidths{.layers = 2, .heads = 1, .channels = 4};

  // Each a channel narrower than the one before; those from `int4_kv` on keep K and V in four bits.
  static Ladder Rungs(int count, int int4_kv = kMostRungs) {
    Ladder ladder = Ladder::DenseOnly(kWidths);
    Rung rung = ladder.rung(0);
    for (int i = 1; i < count; ++i) {
      for (KeepProfile* keep : {&rung.prefill, &rung.decode}) {
        keep->Keep(0, SiteKind::kChannels, kWidths.channels - i);
      }
      rung.int4_kv = i >= int4_kv;
      EXPECT_TRUE(ladder.Append(rung));
    }
    return ladder;
  }
  static Request Never(RequestId id, int prompt, int max_tokens) {
    Request request = MakeRequest(id, prompt, max_tokens);
    request.bounds.never = true;
    return request;
  }
  // Rungs told of the request, until it ends.
  std::set<int> RunUntil(RequestId id) { return RunUntil(id, &weighty_engine_); }
  std::set<int> RunUntil(RequestId id, Engine* engine) {
    std::set<int> rungs;
    for (int i = 0; i < 100; ++i) {
      now_ += Instant{1};
      const auto report = engine->Step(now_);
      EXPECT_TRUE(report.ok()) << report.status();
      engine->scheduler().CheckInvariants();
      if (!report.ok()) break;
      for (const SequenceOutput& output : (*report)->outputs) {
        if (output.id != id) continue;
        rungs.insert(output.rung);
        if (output.finish != FinishReason::kNone) return rungs;
      }
    }
    return {-1};
  }

  const Ladder two_ = Rungs(2);
  FixedPolicy narrow_{1};
  Weighty weighty_{two_, {{.users = 1, .pages = 10}, {.users = 2, .pages = 12}}};
  Engine weighty_engine_{{.max_batch_tokens = 32, .reserve_output = 1, .prefix_cache = false},
                         kGeometry,
                         two_,
                         &weighty_,
                         &narrow_};
  Instant now_{0};
};

TEST_F(WeightsTest, WhoMayHaveTheFullModelAloneWaitsForItsWeights) {
  ASSERT_EQ(weighty_engine_.Submit(MakeRequest(1, 20, 8)), absl::OkStatus());  // 10 to 14 pages
  ASSERT_TRUE(weighty_engine_.Step(now_).ok());
  weighty_engine_.LimitPages(8, now_);
  EXPECT_EQ(weighty_engine_.weights().rungs, 2u) << "the full model's have left";
  EXPECT_EQ(weighty_engine_.scheduler().pages_total(), 18);
  ASSERT_EQ(weighty_engine_.Submit(Never(2, 16, 4)), absl::OkStatus());  // 10 pages
  EXPECT_EQ(RunUntil(1), std::set{1});
  EXPECT_EQ(weighty_engine_.scheduler().stats().waiting, 1) << "no room for both";
  EXPECT_EQ(RunUntil(2), std::set{0});
  EXPECT_EQ(weighty_engine_.weights().rungs, 1u) << "in exchange";
  EXPECT_EQ(weighty_engine_.weights().returns, 1u);
  EXPECT_EQ(weighty_engine_.weights().return_s, 0.25);
  EXPECT_EQ(weighty_engine_.scheduler().pages_total(), 20);
}

TEST_F(WeightsTest, IsRefusedWhatDoesNotFitBesideItsOwnWeightsAlone) {
  weighty_engine_.LimitPages(12, now_);
  ASSERT_EQ(weighty_engine_.Submit(Never(1, 40, 8)), absl::OkStatus());  // 24 pages: 12 and 12
  const absl::Status refused = weighty_engine_.Submit(Never(2, 40, 9));
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      std::string(refused.message()),
      testing::HasSubstr("take 26 KV pages at rung 0, and there may be 24 at present of 32"));
  EXPECT_EQ(RunUntil(1), std::set{0});
}

TEST_F(WeightsTest, AllComeBackWhenThereHasBeenRoomForAWhile) {
  ASSERT_EQ(weighty_engine_.Submit(MakeRequest(1, 20, 8)), absl::OkStatus());
  ASSERT_TRUE(weighty_engine_.Step(now_).ok());
  weighty_engine_.LimitPages(12, now_);
  RunUntil(1);
  weighty_engine_.LimitPages(32, now_);
  EXPECT_TRUE(weighty_engine_.idle());
  const Instant due = weighty_engine_.TendWeights(now_);
  EXPECT_EQ(due, now_ + std::chrono::seconds(1));
  EXPECT_FALSE(weighty_engine_.all_weights());
  EXPECT_EQ(weighty_engine_.TendWeights(due), due) << "something was done, and may be left";
  EXPECT_TRUE(weighty_engine_.all_weights());
  EXPECT_EQ(weighty_engine_.TendWeights(due), kNever);
}

TEST_F(WeightsTest, WeightsLeaveAnIdleEngineThatHasNoRoomForThem) {
  weighty_engine_.LimitPages(-1, now_);
  EXPECT_EQ(weighty_engine_.TendWeights(now_), now_) << "it is to be told";
  EXPECT_EQ(weighty_engine_.weights().rungs, 1u);
  EXPECT_EQ(weighty_engine_.scheduler().pages_total(), 11);
  EXPECT_EQ(weighty_engine_.TendWeights(now_), kNever);
}

TEST_F(WeightsTest, WeightsThatCannotComeBackEndTheEngine) {
  ASSERT_EQ(weighty_engine_.Submit(MakeRequest(1, 20, 8)), absl::OkStatus());
  ASSERT_TRUE(weighty_engine_.Step(now_).ok());
  weighty_engine_.LimitPages(12, now_);
  RunUntil(1);
  weighty_.Lose();
  ASSERT_EQ(weighty_engine_.Submit(Never(2, 4, 4)), absl::OkStatus());
  EXPECT_EQ(weighty_engine_.Step(now_).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(WeightsTest, AnIdleEngineTellsThatWeightsCannotComeBack) {
  weighty_engine_.LimitPages(-1, now_);
  weighty_engine_.TendWeights(now_);
  weighty_engine_.LimitPages(32, now_);
  weighty_.Lose();
  const Instant due = weighty_engine_.TendWeights(now_);
  EXPECT_EQ(weighty_engine_.lost(), absl::OkStatus());
  EXPECT_EQ(weighty_engine_.TendWeights(due), kNever);
  EXPECT_EQ(weighty_engine_.lost().code(), absl::StatusCode::kDataLoss);
}

TEST_F(WeightsTest, AllAreServedAgainThoughWhoRunsHasNoPagesToMove) {
  const Ladder ladder = Rungs(2, /*int4_kv=*/1);
  Told told(0);
  Weighty weighty(ladder, {{.users = 1, .pages = 10}, {.users = 2, .pages = 12}});
  Engine engine({.max_batch_tokens = 64}, kGeometry, ladder, &weighty, &told);
  ASSERT_EQ(engine.Submit(MakeRequest(1, 40, 8)), absl::OkStatus());  // 20 to 24 pages
  ASSERT_TRUE(engine.Step(now_).ok());
  engine.LimitPages(14, now_);
  ASSERT_EQ(engine.weights().rungs, 1u);
  engine.LimitPages(26, now_);
  told.rung = 1;  // ten pages that are shared would have to be copied first
  Request named = MakeRequest(2, 4, 4);
  named.prompt.assign(4, 6);
  named.bounds.rung = 1;
  ASSERT_EQ(engine.Submit(named), absl::OkStatus());
  EXPECT_EQ(RunUntil(2, &engine), std::set{1});
  EXPECT_TRUE(engine.all_weights());
  EXPECT_FALSE(engine.idle()) << "beside the first";
  EXPECT_EQ(RunUntil(1, &engine), std::set{0});
}

TEST_F(WeightsTest, WhatCameBackInVainLeavesAgain) {
  // The second rung needs what the first does; what the third needs comes back in two parts.
  const Ladder ladder = Rungs(3, /*int4_kv=*/1);
  Told told(0);
  Weighty weighty(
      ladder,
      {{.users = 0b011, .pages = 10}, {.users = 0b100, .pages = 6}, {.users = 0b100, .pages = 6}});
  Engine engine({.max_batch_tokens = 64}, kGeometry, ladder, &weighty, &told);
  ASSERT_EQ(engine.Submit(MakeRequest(1, 48, 8)), absl::OkStatus());  // 24 to 28 pages
  ASSERT_TRUE(engine.Step(now_).ok());
  engine.LimitPages(18, now_);
  ASSERT_EQ(engine.weights().rungs, 0b011u);
  ASSERT_EQ(weighty.pages_in_memory(), 10);
  told.rung = 1;  // twelve pages that are shared would have to be copied first
  engine.LimitPages(29, now_);
  ASSERT_TRUE(engine.Step(now_).ok());
  now_ += std::chrono::seconds(1);
  ASSERT_TRUE(engine.Step(now_).ok());
  ASSERT_EQ(weighty.pages_in_memory(), 16) << "a part is back";
  engine.LimitPages(20, now_);
  EXPECT_EQ(engine.weights().rungs, 0b011u);
  EXPECT_EQ(weighty.pages_in_memory(), 10);
  EXPECT_EQ(RunUntil(1, &engine), std::set{0});
}

TEST_F(WeightsTest, WhoFitsBesideTheWeightsOfSomeRungsIsServedThere) {
  const Ladder ladder = Rungs(3);
  Told told(1);
  Weighty weighty(
      ladder,
      {{.users = 0b001, .pages = 2}, {.users = 0b010, .pages = 12}, {.users = 0b100, .pages = 2}});
  Engine engine({.max_batch_tokens = 64}, kGeometry, ladder, &weighty, &told);
  engine.LimitPages(10, now_);
  ASSERT_EQ(engine.Submit(MakeRequest(1, 40, 8)), absl::OkStatus());  // 24 pages: not 10 and 4
  while (!engine.idle()) {
    now_ += Instant{1};
    const auto report = engine.Step(now_);
    ASSERT_TRUE(report.ok());
    EXPECT_LE((*report)->stats.pages_used + weighty.pages_in_memory(), 10 + 16);
    for (const SequenceOutput& output : (*report)->outputs) EXPECT_EQ(output.rung, 2);
  }
}

TEST_F(WeightsTest, WhoCanBeServedAsThingsAreCostsNoExchange) {
  weighty_engine_.LimitPages(-1, now_);
  weighty_engine_.TendWeights(now_);
  ASSERT_EQ(weighty_engine_.weights().rungs, 1u);
  ASSERT_EQ(weighty_engine_.Submit(MakeRequest(1, 4, 4)), absl::OkStatus());
  EXPECT_EQ(RunUntil(1), std::set{0});
  EXPECT_EQ(weighty_engine_.weights().returns, 0u);
}

TEST_F(WeightsTest, WhoHoldsTooMuchIsJudgedByTheLimitAsItIs) {
  const Ladder packed = Rungs(2, /*int4_kv=*/1);
  Told policy(0);
  Weighty executor(packed, {});
  Engine engine({.max_batch_tokens = 64, .prefix_cache = false}, kGeometry, packed, &executor,
                &policy);
  const int page = kGeometry.page_tokens;
  ASSERT_EQ(engine.Submit(MakeRequest(1, 4 * page - 1, 9)), absl::OkStatus());
  ASSERT_TRUE(engine.Step(now_).ok());
  const auto used = [&] { return engine.scheduler().stats().pages_used; };
  ASSERT_EQ(used(), 8);
  engine.LimitPages(9, now_);
  EXPECT_EQ(used(), 8);
  engine.LimitPages(7, now_);
  EXPECT_EQ(used(), 4) << "at once";
  engine.LimitPages(3, now_);
  EXPECT_GT(engine.scheduler().pages_total(), 3) << "it ends";
  ASSERT_TRUE(engine.Cancel(1));
  engine.TendWeights(now_);
  EXPECT_EQ(engine.scheduler().pages_total(), 3) << "though nobody steps";
}

}  // namespace
}  // namespace espalier
