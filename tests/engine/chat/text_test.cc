#include "engine/model/chat/text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "engine/model/chat/failure.h"

namespace espalier::jinja {
namespace {

// Bytes of the caller in upper case, of the template in lower case.
Text Marked(std::string_view marked) {
  Text text;
  for (const char& c : marked) text.Append({&c, 1}, c >= 'A' && c <= 'Z');
  return text;
}

void ExpectOriginsMatchCase(const Text& text) {
  size_t position = 0;
  bool before = false;
  for (const Text::Run& run : text.Runs()) {
    EXPECT_EQ(run.begin, position);
    EXPECT_LT(run.begin, run.end);
    EXPECT_TRUE(position == 0 || run.from_caller != before);
    for (size_t i = run.begin; i < run.end; ++i) {
      EXPECT_EQ(text.bytes()[i] < 'a', run.from_caller) << text.bytes() << " at " << i;
    }
    before = run.from_caller;
    position = run.end;
  }
  EXPECT_EQ(position, text.size());
}

TEST(TextTest, NeighboursOfOneOriginAreOneRun) {
  Text text("ab");
  text.Append("cd", false);
  text.Append("", true);
  text.Append("EF", true);
  text.Append("GH", true);
  ASSERT_EQ(text.Runs().size(), 2u);
  EXPECT_EQ(text.Runs()[0].end, 4u);
  EXPECT_TRUE(text.Runs()[1].from_caller);
}

TEST(TextTest, OriginsSurviveCuttingAndJoining) {
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    std::string marked;
    for (int i = 0; i < 12; ++i) marked += random() % 2 != 0 ? 'A' : 'a';
    const Text text = Marked(marked);
    ExpectOriginsMatchCase(text);
    const size_t begin = random() % 13;
    const size_t end = begin + random() % (13 - begin);
    const Text part = text.Substr(begin, end);
    EXPECT_EQ(part.bytes(), marked.substr(begin, end - begin));
    ExpectOriginsMatchCase(part);
    Text joined = part;
    joined.Append(text);
    joined.Append(part);
    ExpectOriginsMatchCase(joined);
  }
}

TEST(TextTest, RefusesToGrowBeyondItsBound) {
  Text text(std::string(kMaxText, 'x'));
  try {
    text.Append("y");
    FAIL() << "appended beyond the bound";
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.status.code(), absl::StatusCode::kResourceExhausted);
  }
}

TEST(TextTest, CountsCodePointsAndBrokenBytes) {
  EXPECT_EQ(CodePointCount(""), 0u);
  EXPECT_EQ(CodePointCount("aé€😀"), 4u);
  EXPECT_EQ(CodePointCount("\xC3"), 1u);              // cut off
  EXPECT_EQ(CodePointCount("\x80\xBF"), 2u);          // no lead
  EXPECT_EQ(CodePointCount("\xC0\x80"), 2u);          // overlong
  EXPECT_EQ(CodePointCount("\xED\xA0\x80"), 3u);      // surrogate
  EXPECT_EQ(CodePointCount("\xF4\x90\x80\x80"), 4u);  // beyond U+10FFFF
}

TEST(TextTest, Utf8RoundTrip) {
  for (const char32_t c : {0x0u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xFFFDu, 0x10000u, 0x10FFFFu}) {
    std::string bytes;
    AppendUtf8(c, bytes);
    EXPECT_EQ(CodePointAt(bytes, 0), c);
    EXPECT_EQ(CodePointEnd(bytes, 0), bytes.size());
  }
}

TEST(TextTest, StripsWhatPythonCallsSpace) {
  const std::string_view padded = "\x1C\u00A0\u3000 a b\u2028\t";
  const Span rest = Strip(padded, nullptr, true, true);
  EXPECT_EQ(padded.substr(rest.begin, rest.end - rest.begin), "a b");
  const std::string_view chars = "é ";
  const std::string_view accented = "é é\xA9xé";  // the lone byte is no part of é
  const Span kept = Strip(accented, &chars, true, true);
  EXPECT_EQ(accented.substr(kept.begin, kept.end - kept.begin), "\xA9x");
  EXPECT_EQ(Strip("   ", nullptr, false, true).end, 0u);
}

}  // namespace
}  // namespace espalier::jinja
