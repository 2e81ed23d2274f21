#include "policy/blocks/block_search.h"

#include <map>
#include <optional>
#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// Attention frees 6 with 1,000 tokens, an MLP block 10.
constexpr int64_t kTokens = 1000;
BlockMemory Small(int layers) {
  return {
      .layers = layers, .fixed_bytes = 100, .attention_bytes = 1, .mlp_bytes = 10, .kv_bytes = 0};
}

BlockSet All(const BlockMemory& memory) {
  BlockSet all;
  for (int block = 0; block < memory.blocks(); ++block) all.set(block);
  return all;
}

// Each block alone costs its number + 1; neighbours cost 50 more together.
std::optional<double> Neighbours(const BlockSet& removed) {
  double loss = 3;
  for (int block = 0; block < kMostBlocks; ++block) {
    if (!removed[block]) continue;
    loss += block + 1;
    if (block > 0 && removed[block - 1]) loss += 50;
  }
  return loss;
}

std::vector<int> BlocksOf(const BlockPath& path) {
  std::vector<int> blocks;
  for (const BlockStep& step : path) blocks.push_back(step.block);
  return blocks;
}

TEST(GreedyPath, MeasuresAnewAfterEachRemoval) {
  BlockMemory memory = Small(3);
  memory.attention_bytes = 10;  // all blocks alike
  const auto path = GreedyPath(memory, All(memory), kTokens, memory.Bytes({}, kTokens) - 30,
                               {.shortlist = 100}, Neighbours);
  ASSERT_TRUE(path.has_value());
  // Alone 0, 1 and 2 cost least; after 0 went, its neighbour does not.
  EXPECT_EQ(BlocksOf(*path), (std::vector<int>{0, 2, 4}));
  EXPECT_EQ(path->back().loss, 3 + 1 + 3 + 5);
  const auto order = OneShotOrder(memory, All(memory), kTokens, Neighbours);
  ASSERT_TRUE(order.has_value());
  EXPECT_EQ(*order, (std::vector<int>{0, 1, 2, 3, 4, 5}));
}

TEST(GreedyPath, WeighsLossByBytes) {
  const BlockMemory memory = Small(1);
  const auto loss = [](const BlockSet& removed) {
    return std::optional(2.0 * removed[0] + 5.0 * removed[1]);
  };
  const int64_t whole = memory.Bytes({}, kTokens);
  const auto path = GreedyPath(memory, All(memory), kTokens, whole - 1, {}, loss);
  ASSERT_TRUE(path.has_value());
  EXPECT_EQ(BlocksOf(*path), std::vector<int>{1});  // 0.5 a byte, against 2
}

TEST(GreedyPath, TheBestOfARoundAreConfirmedOnMoreText) {
  BlockMemory memory = Small(3);
  memory.attention_bytes = 10;  // all blocks alike
  const int64_t whole = memory.Bytes({}, kTokens);
  std::vector<BlockSet> asked;
  // There the second costs least, and the last nothing, which is not among the best.
  const BlockLoss more = [&](const BlockSet& removed) {
    asked.push_back(removed);
    return std::optional(7 + 2.0 * removed[0] + 1.0 * removed[1] + 9.0 * removed[2] +
                         0.0 * removed[5] + 3.0 * removed[3]);
  };
  const auto path =
      GreedyPath(memory, All(memory), kTokens, whole - 20,
                 {.shortlist = 100, .confirm = more, .confirm_best = 2, .confirm_above = whole - 1},
                 Neighbours);
  ASSERT_TRUE(path.has_value());
  EXPECT_EQ(BlocksOf(*path), (std::vector<int>{1, 3})) << "then by the first text alone";
  EXPECT_EQ(path->front().loss, 3 + 2);
  EXPECT_EQ(path->front().confirmed, 8);
  EXPECT_EQ(path->back().confirmed, std::nullopt);
  EXPECT_EQ(asked, (std::vector<BlockSet>{{}, BlockSet().set(1), BlockSet().set(0)}));
  const auto stopped =
      GreedyPath(memory, All(memory), kTokens, whole - 20,
                 {.confirm = [](const BlockSet&) { return std::optional<double>(); }}, Neighbours);
  EXPECT_FALSE(stopped.has_value());
}

TEST(GreedyPath, LargerBudgetsAreMetByPrefixes) {
  const BlockMemory memory = Small(8);
  const int64_t whole = memory.Bytes({}, kTokens);
  const auto far = GreedyPath(memory, All(memory), kTokens, whole / 2, {}, Neighbours);
  const auto near = GreedyPath(memory, All(memory), kTokens, whole * 3 / 4, {}, Neighbours);
  ASSERT_TRUE(far && near);
  const std::vector<int> longer = BlocksOf(*far), shorter = BlocksOf(*near);
  ASSERT_LT(shorter.size(), longer.size());
  EXPECT_TRUE(std::equal(shorter.begin(), shorter.end(), longer.begin()));
}

TEST(GreedyPath, TriesTheShortlistAndAFewOthers) {
  const BlockMemory memory = Small(16);
  int measured = 0;
  const auto count = [&](const BlockSet& removed) {
    ++measured;
    return Neighbours(removed);
  };
  const auto path = GreedyPath(memory, All(memory), kTokens, memory.Bytes({}, kTokens) - 40,
                               {.shortlist = 3, .drawn = 2}, count);
  ASSERT_TRUE(path.has_value());
  EXPECT_EQ(measured, 1 + 32 + (static_cast<int>(path->size()) - 1) * 5);
}

TEST(GreedyPath, TakesWhatMayLeaveAndStopsThere) {
  const BlockMemory memory = Small(4);
  const BlockSet removable = BlockSet().set(2).set(5);
  const auto path = GreedyPath(memory, removable, kTokens, 0, {}, Neighbours);
  ASSERT_TRUE(path.has_value());
  EXPECT_EQ(path->size(), 2U);
}

TEST(GreedyPath, StopsWhenTheMeasureDoes) {
  const BlockMemory memory = Small(4);
  int left = 5;
  const auto stops = [&](const BlockSet& removed) {
    return left-- > 0 ? Neighbours(removed) : std::nullopt;
  };
  EXPECT_EQ(GreedyPath(memory, All(memory), kTokens, 0, {}, stops), std::nullopt);
  left = 5;
  EXPECT_EQ(OneShotOrder(memory, All(memory), kTokens, stops), std::nullopt);
}

TEST(FitBudget, TakesBackWhatTurnsOutToFit) {
  const BlockMemory memory = Small(2);  // attention frees 1, MLPs 10
  const int64_t whole = memory.Bytes({}, kTokens);
  const std::vector<int> order = {0, 2, 1, 3};
  EXPECT_EQ(FitBudget(memory, order, kTokens, whole), BlockSet());
  EXPECT_EQ(FitBudget(memory, order, kTokens, whole - 2), BlockSet().set(0).set(2));
  // 12 were freed and 10 do: both attention blocks stay.
  EXPECT_EQ(FitBudget(memory, order, kTokens, whole - 10), BlockSet().set(1));
  EXPECT_EQ(FitBudget(memory, order, kTokens, whole - 11), BlockSet().set(0).set(1));
  EXPECT_EQ(FitBudget(memory, order, kTokens, 0), BlockSet().set(0).set(1).set(2).set(3));
}

}  // namespace
}  // namespace espalier
