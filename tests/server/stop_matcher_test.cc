#include "server/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

namespace espalier {
namespace {

struct Outcome {
  std::string text;
  std::string stop;
};

// Feeds `text` in pieces of the given sizes, the last one repeated.
Outcome Feed(std::vector<std::string> stops, std::string_view text, std::vector<size_t> sizes) {
  StopMatcher matcher(std::move(stops));
  Outcome outcome;
  for (size_t i = 0; !text.empty() && matcher.matched().empty(); ++i) {
    const size_t size = std::min(sizes[std::min(i, sizes.size() - 1)], text.size());
    outcome.text += matcher.Push(text.substr(0, size), true);
    text.remove_prefix(size);
  }
  outcome.stop = matcher.matched();
  outcome.text += matcher.Flush();
  return outcome;
}

TEST(StopMatcher, PassesTextThroughWithoutStops) {
  StopMatcher matcher({});
  EXPECT_EQ(matcher.Push("anything", true), "anything");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher matcher({"###", "\nUser"});
  EXPECT_EQ(matcher.Push("a#", true), "a");
  EXPECT_EQ(matcher.Push("#", true), "");
  EXPECT_EQ(matcher.Push("b", true), "##b");
  EXPECT_EQ(matcher.Push("\nUs", true), "");
  EXPECT_EQ(matcher.Push("ed", true), "\nUsed");
  EXPECT_EQ(matcher.Push("##", true), "");
  EXPECT_EQ(matcher.Push("# tail", true), "");
  EXPECT_EQ(matcher.matched(), "###");
  EXPECT_EQ(matcher.Push("more", true), "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, UnfinishedStopIsTextAtTheEnd) {
  StopMatcher matcher({"STOP"});
  EXPECT_EQ(matcher.Push("so ST", true), "so ");
  EXPECT_EQ(matcher.Flush(), "ST");
}

TEST(StopMatcher, FirstCompleteStopWinsAndThenTheLongest) {
  EXPECT_EQ(Feed({"cd", "bcde"}, "abcdef", {10}).stop, "cd");
  EXPECT_EQ(Feed({"cd", "bcde"}, "abcdef", {10}).text, "ab");
  EXPECT_EQ(Feed({"cd", "bcd"}, "abcdef", {10}).stop, "bcd");
  EXPECT_EQ(Feed({"bcd", "cd"}, "abcdef", {10}).text, "a");
}

TEST(StopMatcher, BeforeItMayStopAStopIsText) {
  StopMatcher matcher({"aa"});
  EXPECT_EQ(matcher.Push("aa", false), "a");
  EXPECT_EQ(matcher.Push("b", false), "ab");
  EXPECT_EQ(matcher.Push("a", false), "");
  EXPECT_EQ(matcher.Push("a", true), "");
  EXPECT_EQ(matcher.matched(), "aa");
}

TEST(StopMatcher, NeverCutsACharacter) {
  StopMatcher matcher({"é!"});
  EXPECT_EQ(matcher.Push("caf", true), "caf");
  EXPECT_EQ(matcher.Push("é", true), "");
  EXPECT_EQ(matcher.Push("è", true), "éè");
}

// However the text is cut, the outcome is that of the whole text at once.
TEST(StopMatcher, CutsMakeNoDifference) {
  std::mt19937 random(7);
  const auto draw = [&](int below) { return static_cast<int>(random() % below); };
  int stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    const auto word = [&](int length) {
      std::string text;
      for (int i = 0; i < length; ++i) text += static_cast<char>('a' + draw(2));
      return text;
    };
    const std::string text = word(draw(40));
    std::vector<std::string> stops;
    for (int i = draw(4); i >= 0; --i) stops.push_back(word(3 + draw(6)));
    std::vector<size_t> sizes;
    for (int i = 0; i < 20; ++i) sizes.push_back(1 + draw(4));
    const Outcome whole = Feed(stops, text, {1000});
    const Outcome cut = Feed(stops, text, sizes);
    const Outcome bytes = Feed(stops, text, {1});
    ASSERT_EQ(whole.text, cut.text) << text;
    ASSERT_EQ(whole.stop, cut.stop) << text;
    ASSERT_EQ(whole.text, bytes.text) << text;
    ASSERT_EQ(whole.stop, bytes.stop) << text;
    if (!whole.stop.empty()) ++stopped;
  }
  EXPECT_GT(stopped, 500);
  EXPECT_LT(stopped, 2500);
}

}  // namespace
}  // namespace espalier
