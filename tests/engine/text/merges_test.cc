#include "engine/model/text/merges.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <utility>

namespace espalier {
namespace {

// The definition: of all neighbours take the lowest rank, leftmost first, until none has one.
std::vector<int32_t> EncodeSlowly(const std::vector<Merges::Rule>& rules,
                                  std::vector<int32_t> tokens) {
  std::map<std::pair<int32_t, int32_t>, size_t> ranks;
  for (size_t rank = 0; rank < rules.size(); ++rank) {
    ranks[{rules[rank].left, rules[rank].right}] = rank;
  }
  for (;;) {
    size_t best = rules.size();
    size_t at = 0;
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto rank = ranks.find({tokens[i], tokens[i + 1]});
      if (rank != ranks.end() && rank->second < best) {
        best = rank->second;
        at = i;
      }
    }
    if (best == rules.size()) return tokens;
    tokens[at] = rules[best].merged;
    tokens.erase(tokens.begin() + static_cast<ptrdiff_t>(at) + 1);
  }
}

// Rules in no sensible order, so that a merge often makes way for one of a lower rank.
TEST(Merges, EqualTheDefinitionForAnyRules) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    Merges merges;
    for (int i = 0; i < 4; ++i) merges.SetByteToken(static_cast<uint8_t>('a' + i), i);
    std::vector<Merges::Rule> rules;
    for (int32_t merged = 4; merged < 40; ++merged) {
      const Merges::Rule rule{static_cast<int32_t>(random() % 20),
                              static_cast<int32_t>(random() % 20), merged};
      if (merges.Add(rule)) rules.push_back(rule);
    }
    Merges::Scratch scratch;
    for (int i = 0; i < 20; ++i) {
      std::string piece;
      std::vector<int32_t> bytes;
      for (size_t n = random() % 40; n > 0; --n) {
        const auto token = static_cast<int32_t>(random() % 5);  // 'e' has none
        piece.push_back(static_cast<char>('a' + token));
        if (token < 4) bytes.push_back(token);
      }
      std::vector<int32_t> tokens = {99};  // what is there stays
      merges.Encode(piece, scratch, tokens);
      std::vector<int32_t> expected = EncodeSlowly(rules, bytes);
      expected.insert(expected.begin(), 99);
      ASSERT_EQ(tokens, expected) << piece;
    }
  }
}

TEST(Merges, RefuseASecondRuleForAPair) {
  Merges merges;
  EXPECT_TRUE(merges.Add({1, 2, 3}));
  EXPECT_FALSE(merges.Add({1, 2, 4}));
  EXPECT_TRUE(merges.Add({2, 1, 4}));
}

}  // namespace
}  // namespace espalier
