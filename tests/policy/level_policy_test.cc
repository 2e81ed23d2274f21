#include "policy/level_policy.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "policy/serving_trainer.h"

namespace espalier {
namespace {

constexpr int kRungs = 3;

Ladder Three() {
  const SiteWidths widths{.layers = 2, .heads = 2, .channels = 64};
  Ladder ladder = Ladder::DenseOnly(widths);
  KeepProfile keep = KeepProfile::Dense(widths);
  for (const int kept : {32, 0}) {
    keep.Keep(1, SiteKind::kChannels, kept);
    EXPECT_TRUE(ladder.Append({keep, keep, {}}));
  }
  return ladder;
}

// Remembers what it was asked.
class Asked final : public LevelPolicy {
 public:
  using LevelPolicy::LevelPolicy;
  std::string_view name() const override { return "asked"; }
  std::vector<LevelState> states;
  int level = 0, offered = 0;

 protected:
  int Decide(const LevelState& state, int rungs) override {
    states.push_back(state);
    offered = rungs;
    return level;
  }
};

TEST(LevelPolicy, DecidesEverySoOften) {
  const Ladder ladder = Three();
  Asked policy({.every_s = 0.2});
  for (const double time : {5.0, 5.05, 5.19, 5.21, 5.3, 9.0}) {
    policy.Observe({.time_s = time}, ladder);
  }
  EXPECT_EQ(policy.states.size(), 3U);
}

TEST(LevelPolicy, SeesSharesOfTargets) {
  const Ladder ladder = Three();
  Asked policy({.ttft_target_s = 2, .tpot_target_s = 0.1, .every_s = 0.2});
  policy.level = 1;
  policy.Observe({.time_s = 1, .waiting = 3}, ladder);
  policy.Observe({.time_s = 2,
                  .kv_used = 0.5,
                  .kv_promised = 0.25,
                  .queue_length = 0.125,
                  .oldest_wait_s = 1,
                  .step_s = 0.05,
                  .first_token_s = 3,
                  .arrivals_per_s = 3,
                  .running = 15,
                  .waiting = 255},
                 ladder);
  EXPECT_EQ(policy.states[0], (LevelState{0, 0, 0, 0, 0, 0, 0.25F, 0, 0, 0, 0, 1}));
  EXPECT_EQ(policy.states[1],
            (LevelState{0.5F, 0.25F, 0.125F, 0.5F, 0.5F, 0.5F, 1, 0.75F, 1.5F, 0.25F, 0.5F, 0}));
}

TEST(LevelPolicy, ServesAtTheLevelOrTheHardestMilderRung) {
  const Ladder ladder = Three();
  Asked policy(LevelPolicyOptions{});
  policy.level = 1;
  policy.Observe({.time_s = 1}, ladder);
  EXPECT_EQ(policy.ChooseRung({.allowed = 7}), 1);
  EXPECT_EQ(policy.ChooseRung({.allowed = 5}), 0);
  EXPECT_EQ(policy.reason(), "learned");
}

TEST(LevelPolicy, IsOfferedWhatMayBeCost) {
  const SiteWidths widths{.layers = 1, .heads = 2, .channels = 64};
  Ladder ladder = Ladder::DenseOnly(widths);
  for (const double loss : {0.1, 0.2, 0.3}) {
    ASSERT_TRUE(ladder.Append(
        {ladder.rung(0).prefill, ladder.rung(0).decode, {.quality_loss_nats = loss}}));
  }
  Asked policy({.every_s = 0.2, .load_loss = 0.2});
  policy.Observe({.time_s = 1, .oldest_wait_s = 9}, ladder);
  EXPECT_EQ(policy.offered, 3);
  policy.Observe({.time_s = 2, .kv_used = 1.1}, ladder);
  EXPECT_EQ(policy.offered, 4);
}

TEST(DqnPolicy, TakesTheHighestValue) {
  QNetwork network({.inputs = kLevelInputs, .hidden = 1, .actions = kRungs});
  // The unit is the oldest wait; action 2 is worth it, action 0 half, less a half.
  network.parameters()[3] = 1;
  network.parameters()[network.output() + 2] = 1;
  network.parameters()[network.output_bias() + 0] = 0.5F;
  DqnPolicy policy({.ttft_target_s = 1, .every_s = 0}, &network);
  const Ladder ladder = Three();
  policy.Observe({.time_s = 1, .oldest_wait_s = 0.4}, ladder);
  EXPECT_EQ(policy.wanted(), 0);
  EXPECT_THAT(policy.scores(), testing::ElementsAre(0.5F, 0, 0.4F));
  policy.Observe({.time_s = 2, .oldest_wait_s = 0.6}, ladder);
  EXPECT_EQ(policy.wanted(), 2);
}

TEST(ServingTrainer, LearnsWhatPays) {
  // A long wait is rewarded on rung 2 alone, a short one on rung 0 alone.
  const Ladder ladder = Three();
  DoubleDqn dqn({.inputs = kLevelInputs, .hidden = 16, .actions = kRungs},
                {.gamma = 0.5F, .learning_rate = 3e-3F, .target_every = 50});
  const LevelPolicyOptions options{.ttft_target_s = 1, .every_s = 0.1};
  for (int episode = 0; episode < 100; ++episode) {
    ServingTrainer trainer(options, 0.5, &dqn);
    for (int i = 0; i < 40; ++i) {
      const bool waits = (episode + i / 5) % 2 == 0;
      trainer.Observe({.time_s = i * 0.2, .oldest_wait_s = waits ? 1.0 : 0.0}, ladder);
      trainer.Reward(trainer.wanted() == (waits ? 2 : 0) ? 1 : 0);
    }
    trainer.End();
  }
  DqnPolicy policy(options, &dqn.network());
  for (int i = 0; i < 20; ++i) {
    const bool waits = i / 5 % 2 == 0;
    policy.Observe({.time_s = i * 0.2, .oldest_wait_s = waits ? 1.0 : 0.0}, ladder);
    EXPECT_EQ(policy.wanted(), waits ? 2 : 0) << i;
  }
}

}  // namespace
}  // namespace espalier
