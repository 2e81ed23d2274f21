#include "policy/blocks/block_orders.h"

#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace espalier {
namespace {

const BlockOrders kOrders{
    .layers = 30,
    .orders = {{.tokens = 4096, .blocks = {48, 22, 41}}, {.tokens = 32768, .blocks = {48, 0, 59}}}};

TEST(BlockOrders, ReadsWhatItWrote) {
  const std::string text = FormatBlockOrders(kOrders, "measured\nhere");
  EXPECT_EQ(text,
            "espalier-blocks 1\n# measured\n# here\nmodel layers=30\n"
            "order tokens=4096 a24 a11 m20\norder tokens=32768 a24 a0 m29\n");
  BlockOrders read;
  std::string error;
  ASSERT_TRUE(ParseBlockOrders(text, &read, &error)) << error;
  EXPECT_EQ(read.layers, 30);
  EXPECT_EQ(read.orders, kOrders.orders);
}

TEST(BlockOrders, FindsTheNearestInTokens) {
  EXPECT_EQ(kOrders.For(1).tokens, 4096);
  EXPECT_EQ(kOrders.For(11000).tokens, 4096);
  EXPECT_EQ(kOrders.For(12000).tokens, 32768);
}

TEST(BlockOrders, SaysTheLineAndWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "line 1: expected 'espalier-blocks 1'"},
      {"espalier-blocks 2\n", "line 1: expected 'espalier-blocks 1'"},
      {"espalier-blocks 1\n", "it has no order"},
      {"espalier-blocks 1\norder tokens=1 a0", "line 2: an order before the model"},
      {"espalier-blocks 1\nmodel layers=129",
       "line 2: expected layers=1 to layers=128, got "
       "'layers=129'"},
      {"espalier-blocks 1\nmodel layers=2\nmodel layers=2", "line 3: a second model"},
      {"espalier-blocks 1\nmodel layers=2 x", "line 2: more than layers"},
      {"espalier-blocks 1\nmodel layers=2\norder a0",
       "line 3: expected tokens= and a positive "
       "count, got 'a0'"},
      {"espalier-blocks 1\nmodel layers=2\norder tokens=0",
       "line 3: expected tokens= and a "
       "positive count, got 'tokens=0'"},
      {"espalier-blocks 1\nmodel layers=2\n\norder tokens=5 a2",
       "line 4: expected a block, a0 to "
       "m1, got 'a2'"},
      {"espalier-blocks 1\nmodel layers=2\norder tokens=5 a1 m0 a1", "line 3: 'a1' a second time"},
      {"espalier-blocks 1\nmodel layers=2\norder tokens=5 a1\norder tokens=5",
       "line 4: a second order for as many tokens"},
      {"espalier-blocks 1\nblock a1", "line 2: expected model or order, got 'block'"},
  };
  for (const auto& [text, expected] : cases) {
    BlockOrders read = kOrders;
    std::string error;
    EXPECT_FALSE(ParseBlockOrders(text, &read, &error)) << text;
    EXPECT_EQ(error, expected) << text;
    EXPECT_EQ(read.orders, kOrders.orders);
  }
}

}  // namespace
}  // namespace espalier
