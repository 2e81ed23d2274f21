#include "engine/model/text/special_tokens.h"

#include <gtest/gtest.h>

#include <string>

namespace espalier {
namespace {

void ExpectMatch(const SpecialTokens::Match& match, size_t begin, size_t end, int32_t token) {
  EXPECT_EQ(match.begin, begin);
  EXPECT_EQ(match.end, end);
  EXPECT_EQ(match.token, token);
}

TEST(SpecialTokens, LeftmostThenLongest) {
  SpecialTokens tokens;
  EXPECT_TRUE(tokens.Add("<a>", 1));
  EXPECT_TRUE(tokens.Add("<a><b>", 2));
  EXPECT_TRUE(tokens.Add("a><b>", 3));
  EXPECT_FALSE(tokens.Add("<a>", 4));
  ExpectMatch(tokens.Find("x<a><b>", 0), 1, 7, 2);
  ExpectMatch(tokens.Find("x<a><b", 0), 1, 4, 1);
  ExpectMatch(tokens.Find("x<a><b>", 2), 2, 7, 3);
  ExpectMatch(tokens.Find("<<a>", 0), 1, 4, 1);
}

TEST(SpecialTokens, NoMatchIsTheEndOfTheText) {
  SpecialTokens none;
  ExpectMatch(none.Find("abc", 0), 3, 3, -1);
  none.Add("abcd", 1);
  ExpectMatch(none.Find("abc", 0), 3, 3, -1);
  ExpectMatch(none.Find("", 0), 0, 0, -1);
}

}  // namespace
}  // namespace espalier
