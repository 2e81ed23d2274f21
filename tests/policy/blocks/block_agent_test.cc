#include "policy/blocks/block_agent.h"

#include <optional>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// Two layers without KV: attention frees 6, an MLP block 10; 100 stay in any case.
const BlockMemory kMemory{
    .layers = 2, .fixed_bytes = 100, .attention_bytes = 6, .mlp_bytes = 10, .kv_bytes = 0};
const BlockSet kAll = BlockSet().set(0).set(1).set(2).set(3);
// 10 of 132 bytes must go.
constexpr double kShare = 122.5 / 132;

// Per byte block 0 costs least; but it is not enough, and with any other costs more than 1 does.
std::optional<double> Trap(const BlockSet& removed) {
  return 0.5 * removed[0] + 0.9 * removed[1] + 0.6 * removed[2] + 2.0 * removed[3];
}

BlockTrainingOptions Options() {
  BlockTrainingOptions options{.episodes = 400, .least_share = kShare, .most_share = kShare};
  options.dqn.batch = 32;
  return options;
}

const auto kGoOn = [](int, int) { return true; };

TEST(BlockAgent, FindsWhatGreedyCannot) {
  const BlockTask task{.batch = 1, .length = 4096, .share = kShare};
  const auto greedy = GreedyPath(kMemory, kAll, task.tokens(), task.Budget(kMemory), {}, Trap);
  ASSERT_TRUE(greedy.has_value());
  EXPECT_EQ(greedy->front().block, 0);
  const auto network = TrainBlockAgent(kMemory, kAll, {}, Options(), Trap, kGoOn);
  ASSERT_TRUE(network.has_value());
  const auto order = AgentOrder(kMemory, kAll, *network, task, Trap);
  ASSERT_TRUE(order.has_value());
  EXPECT_EQ(*order, std::vector<int>{1});
  EXPECT_LT(*Trap(BlockSet().set(1)), greedy->back().loss);
}

TEST(BlockAgent, SameSeedSameNetwork) {
  BlockTrainingOptions options = Options();
  options.episodes = 50;
  const std::vector<std::pair<int64_t, std::vector<int>>> guides = {{4096, {0, 2, 1, 3}}};
  const auto first = TrainBlockAgent(kMemory, kAll, guides, options, Trap, kGoOn);
  const auto again = TrainBlockAgent(kMemory, kAll, guides, options, Trap, kGoOn);
  options.dqn.seed = 2;
  const auto other = TrainBlockAgent(kMemory, kAll, guides, options, Trap, kGoOn);
  ASSERT_TRUE(first && again && other);
  EXPECT_EQ(first->Format({}), again->Format({}));
  EXPECT_NE(first->Format({}), other->Format({}));
}

TEST(BlockAgent, StopsWhenItIsTold) {
  EXPECT_FALSE(
      TrainBlockAgent(kMemory, kAll, {}, Options(), Trap, [](int done, int) { return done < 7; }));
  EXPECT_FALSE(TrainBlockAgent(
      kMemory, kAll, {}, Options(), [](const BlockSet&) { return std::optional<double>(); },
      kGoOn));
}

TEST(BlockAgent, RemovesOnlyWhatMayLeaveAndFits) {
  const QNetwork untrained(BlockAgentShape(kMemory));
  const BlockTask task{.batch = 2, .length = 512, .share = 0.81};
  const auto order = AgentOrder(kMemory, BlockSet().set(1).set(2).set(3), untrained, task, Trap);
  ASSERT_TRUE(order.has_value());
  EXPECT_EQ(*order, (std::vector<int>{1, 2, 3}));
  BlockSet removed;
  for (const int block : *order) removed.set(block);
  EXPECT_LE(kMemory.Bytes(removed, task.tokens()), task.Budget(kMemory));
}

}  // namespace
}  // namespace espalier
