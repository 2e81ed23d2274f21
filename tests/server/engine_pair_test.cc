// Two engines within one limit of KV pages, beside weights that may leave.
#include "server/engine_pair.h"

#include <gtest/gtest.h>

#include <span>
#include <utility>
#include <vector>

#include "tests/support/puppet_executor.h"

namespace espalier {
namespace {

constexpr KvGeometry kGeometry{.layers = 2, .pages = 40, .context = 4096};

Ladder TwoRungs() {
  const SiteWidths widths{.layers = 2, .heads = 1, .channels = 2};
  Ladder ladder = Ladder::DenseOnly(widths);
  Rung rung = ladder.rung(0);
  for (KeepProfile* keep : {&rung.prefill, &rung.decode}) keep->Keep(0, SiteKind::kChannels, 1);
  EXPECT_TRUE(ladder.Append(rung));
  return ladder;
}

// Each of its two rungs has weights of its own, worth so many pages.
class Weighty final : public Executor {
 public:
  explicit Weighty(int worth) : puppet_(kGeometry, TwoRungs()), worth_(worth) {}

  absl::Status Execute(const Batch& batch, StepResult* result) override {
    return puppet_.Execute(batch, result);
  }
  void FitPages(std::span<const std::pair<int32_t, int32_t>> moves, int pages) override {
    puppet_.FitPages(moves, pages);
  }
  int ReleasablePages(RungSet served) const override {
    return worth_ * ((served & 1) == 0) + worth_ * ((served & 2) == 0);
  }
  absl::StatusOr<WeightsFit> FitWeights(RungSet, bool) override { return WeightsFit{}; }

 private:
  PuppetExecutor puppet_;
  const int worth_;
};

struct WeightyEngine {
  explicit WeightyEngine(int worth) : executor(worth) {}

  Weighty executor;
  FixedPolicy policy{0};
  Engine engine = Engine(SchedulerOptions(), kGeometry, TwoRungs(), &executor, &policy);
};

class EnginePairTest : public ::testing::Test {
 protected:
  // 20 pages, once its prompt is computed.
  void StartOne() {
    ASSERT_TRUE(old_.engine
                    .Submit({.id = 1,
                             .prompt = std::vector<int32_t>(150, 7),
                             .stop = {.max_tokens = 10},
                             .bounds = {.never = true}})
                    .ok());
    for (int i = 0; i < 2; ++i) ASSERT_TRUE(pair_.Step(++now_).ok());
    ASSERT_EQ(old_.engine.scheduler().stats().pages_used, 20);
  }
  // Of the memory that both share, beside all weights.
  int Taken() const {
    return old_.engine.pages_beside_weights() + new_.engine.pages_beside_weights();
  }

  Instant now_{0};
  WeightyEngine old_{12}, new_{12};
  EnginePair pair_{&old_.engine};
};

TEST_F(EnginePairTest, EachHasWhatItsRequestsMayHold) {
  StartOne();
  pair_.Replace(&new_.engine, now_);
  EXPECT_EQ(old_.engine.scheduler().pages_total(), 20);
  EXPECT_EQ(new_.engine.scheduler().pages_total(), 20);
  pair_.LimitPages(30, now_);
  EXPECT_EQ(old_.engine.scheduler().pages_total(), 20);
  EXPECT_EQ(new_.engine.scheduler().pages_total(), 10);
}

// Read before the switch, it comes in when the engine before is idle and has given its pages away.
TEST_F(EnginePairTest, LateNewcomersFindRoomOnTheEngineBefore) {
  pair_.Replace(&new_.engine, ++now_);
  Request late{.id = 1, .prompt = std::vector<int32_t>(150, 7), .stop = {.max_tokens = 10}};
  EXPECT_FALSE(old_.engine.Submit(late).ok());
  pair_.MakeRoomOnLeft(late, ++now_);
  ASSERT_TRUE(old_.engine.Submit(late).ok());
  for (int i = 0; i < 20 && !old_.engine.idle(); ++i) ASSERT_TRUE(pair_.Step(++now_).ok());
  EXPECT_TRUE(old_.engine.idle());
}

TEST_F(EnginePairTest, PagesThatWeightsMadeRoomForAreNobodyElses) {
  StartOne();
  pair_.LimitPages(10, now_);
  ASSERT_EQ(pair_.weights().rungs, 1u) << "the other rung's weights left";
  ASSERT_EQ(old_.engine.scheduler().pages_total(), 22);
  pair_.Replace(&new_.engine, now_);
  EXPECT_EQ(new_.engine.scheduler().pages_total(), 0);
  pair_.LimitPages(24, now_);
  EXPECT_EQ(old_.engine.scheduler().pages_total(), 32) << "20, and 12 for weights";
  EXPECT_EQ(new_.engine.scheduler().pages_total(), 4);
  EXPECT_EQ(Taken(), 24);
  pair_.Share(now_);
  EXPECT_EQ(new_.engine.scheduler().pages_total(), 4);
}

TEST_F(EnginePairTest, WeightsLeaveForWhatIsMissing) {
  StartOne();
  pair_.Replace(&new_.engine, now_);
  // Who runs keeps 20 pages, and the two can do without 24 pages' worth of weights.
  pair_.LimitPages(-4, now_);
  pair_.TendWeights(++now_);
  EXPECT_EQ(old_.engine.weights().rungs, 1u);
  EXPECT_EQ(new_.engine.weights().rungs, 1u);
  EXPECT_EQ(old_.engine.scheduler().pages_total(), 20);
  EXPECT_EQ(Taken(), -4);

  pair_.LimitPages(40, now_);
  EXPECT_EQ(Taken(), 40);
  while (!pair_.left()->idle()) ASSERT_TRUE(pair_.Step(++now_).ok());
  pair_.Retire(now_);
  EXPECT_EQ(new_.engine.pages_beside_weights(), 28) << "a pool of 40, 12 of them for weights";
  now_ += std::chrono::seconds(1);
  for (int i = 0; i < 3; ++i) pair_.TendWeights(now_ += std::chrono::seconds(1));
  EXPECT_TRUE(new_.engine.all_weights());
  EXPECT_EQ(new_.engine.scheduler().pages_total(), 40);
}

TEST_F(EnginePairTest, WhoHasNoWeightsToSpareIsAskedForNone) {
  WeightyEngine light(0);
  StartOne();
  pair_.Replace(&light.engine, now_);
  pair_.LimitPages(-40, now_);
  pair_.TendWeights(++now_);
  EXPECT_EQ(old_.engine.weights().rungs, 1u);
  EXPECT_EQ(light.engine.scheduler().pages_total(), 0);
  EXPECT_TRUE(light.engine.all_weights());
}

}  // namespace
}  // namespace espalier
