#include "engine/pruning/weights/pattern.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

TEST(Pattern, ReadsSharesAndGroups) {
  EXPECT_EQ(ParsePattern("0.5"), (Pattern{.sparsity = 0.5}));
  EXPECT_EQ(ParsePattern("2:4"), (Pattern{.sparsity = 0.5, .keep = 2, .group = 4}));
  EXPECT_EQ(ParsePattern("1:4"), (Pattern{.sparsity = 0.75, .keep = 1, .group = 4}));
  EXPECT_EQ(ParsePattern("4:8")->name(), "4:8");
  EXPECT_EQ(ParsePattern("0.25")->name(), "0.25");
  for (const char* text : {"", "0", "1", "-0.5", "nan", "0.5x", "2:", ":4", "4:4", "5:4", "0:4",
                           "2:4:8", "-2:4", "2:65", "2:99999999999"}) {
    EXPECT_FALSE(ParsePattern(text).has_value()) << text;
  }
}

TEST(Pattern, ShortGroupsKeepAsManyAsWholeOnes) {
  const Pattern pattern = *ParsePattern("2:4");
  EXPECT_EQ(pattern.PrunedOf(8), 4);
  EXPECT_EQ(pattern.PrunedOf(9), 4);
  EXPECT_EQ(pattern.PrunedOf(10), 4);
  EXPECT_EQ(pattern.PrunedOf(11), 5);
  EXPECT_EQ(ParsePattern("0.5")->PrunedOf(11), 6);
}

}  // namespace
}  // namespace espalier
