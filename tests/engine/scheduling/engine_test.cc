#include "engine/engine.h"

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

}  // namespace
}  // namespace espalier
