#include "policy/blocks/block_memory.h"

#include <initializer_list>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// LLaMA-2-7B in fp16: 32 layers, hidden 4096, MLP 11008, 32 KV heads of 128, vocabulary 32000.
BlockMemory Llama7b() {
  const int64_t hidden = 4096, mlp = 11008, vocabulary = 32000, layers = 32;
  return {.layers = 32,
          .fixed_bytes = 2 * (2 * vocabulary * hidden + (2 * layers + 1) * hidden),
          .attention_bytes = 2 * 4 * hidden * hidden,
          .mlp_bytes = 2 * 3 * hidden * mlp,
          .kv_bytes = 2 * 2 * hidden};
}

BlockSet Blocks(std::initializer_list<int> attention, std::initializer_list<int> mlp) {
  BlockSet blocks;
  for (const int layer : attention) blocks.set(AttentionBlock(layer));
  for (const int layer : mlp) blocks.set(MlpBlock(layer));
  return blocks;
}

constexpr int64_t kTokens = 8 * 2048;

double Gigabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

// The three rows that RAP's author published: batch 8, 2,048 tokens, budgets of 0.8 and 0.6.
TEST(BlockMemory, GivesThePublishedBytes) {
  const BlockMemory memory = Llama7b();
  const BlockSet at80 = Blocks({18, 19, 21, 23, 24, 25, 27, 28, 30}, {13, 22, 24, 27});
  const BlockSet at60 = Blocks({8, 10, 12, 13, 14, 18, 19, 21, 22, 23, 24, 25, 27, 28, 30},
                               {7, 8, 9, 12, 13, 18, 20, 22, 24, 26, 27});
  EXPECT_NEAR(Gigabytes(memory.Bytes({}, 0)), 13.477, 0.0005);
  EXPECT_NEAR(Gigabytes(memory.KvBytes({}, kTokens)), 8.590, 0.0005);
  EXPECT_NEAR(Gigabytes(memory.Bytes({}, kTokens)), 22.07, 0.005);
  EXPECT_NEAR(Gigabytes(memory.Bytes(at80, kTokens)), 17.36, 0.005);
  EXPECT_NEAR(Gigabytes(memory.Bytes(at60, kTokens)), 13.05, 0.005);
  // Shares of the parameters that left.
  const auto weights = static_cast<double>(memory.Bytes({}, 0));
  EXPECT_NEAR(1 - static_cast<double>(memory.Bytes(at80, 0)) / weights, 0.170, 0.0005);
  EXPECT_NEAR(1 - static_cast<double>(memory.Bytes(at60, 0)) / weights, 0.370, 0.0005);
}

// As one that removes block after block and stops as soon as the budget holds.
TEST(BlockMemory, ThePublishedMasksFitAndHaveALastBlock) {
  const BlockMemory memory = Llama7b();
  const BlockSet mask = Blocks({18, 19, 21, 23, 24, 25, 27, 28, 30}, {13, 22, 24, 27});
  const auto budget = static_cast<int64_t>(0.8 * static_cast<double>(memory.Bytes({}, kTokens)));
  EXPECT_LE(memory.Bytes(mask, kTokens), budget);
  EXPECT_GT(memory.Bytes(BlockSet(mask).reset(AttentionBlock(30)), kTokens), budget);
}

TEST(BlockMemory, AttentionFreesMoreBeyondSoManyTokens) {
  const BlockMemory memory = Llama7b();
  const int64_t equal = (memory.mlp_bytes - memory.attention_bytes) / memory.kv_bytes;
  EXPECT_NEAR(static_cast<double>(equal), 8300, 100);
  EXPECT_LT(memory.Freed(AttentionBlock(0), equal - 1), memory.Freed(MlpBlock(0), equal - 1));
  EXPECT_GT(memory.Freed(AttentionBlock(0), equal + 1), memory.Freed(MlpBlock(0), equal + 1));
}

TEST(BlockMemory, Describes) {
  EXPECT_EQ(DescribeBlocks({}), "none");
  EXPECT_EQ(DescribeBlocks(Blocks({3, 7, 8, 9, 127}, {})), "attention 3 7-9 127");
  EXPECT_EQ(DescribeBlocks(Blocks({0}, {1, 2, 127})), "attention 0, mlp 1-2 127");
}

}  // namespace
}  // namespace espalier
