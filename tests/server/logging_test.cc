#include "server/logging.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace espalier {
namespace {

using nlohmann::json;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

std::string Line(LogFormat format, std::string_view message,
                 std::initializer_list<LogField> fields) {
  return FormatLogLine(format, message, std::span(fields.begin(), fields.size()));
}

std::string Object(const std::string& members) { return fmt::format("{{{}}}", members); }

// What `write` puts on standard error.
template <typename F>
std::string Captured(F write) {
  ::testing::internal::CaptureStderr();
  write();
  return ::testing::internal::GetCapturedStderr();
}

TEST(LoggingTest, TextQuotesOnlyWhatNeedsIt) {
  EXPECT_EQ(Line(LogFormat::kText, "serving",
                 {{"port", 50051}, {"share", 0.25}, {"on", true}, {"name", "a b"}, {"id", "r-1"}}),
            R"(serving port=50051 share=0.25 on=true name="a b" id=r-1)");
  EXPECT_EQ(Line(LogFormat::kText, "m", {{"empty", ""}}), R"(m empty="")");
}

TEST(LoggingTest, WhateverACallerSendsIsOneLineOfJson) {
  const std::string values[] = {
      "plain",       "quote \" backslash \\", "line\nbreak\r\ttab", std::string("nul\0byte", 8),
      "caf\xC3\xA9", "\xE2\x82\xAC",          "\xF0\x9F\x8C\xB3",   "\x7F",
  };
  for (const std::string& value : values) {
    const std::string line = Object(Line(LogFormat::kJson, value, {{"field", value}}));
    EXPECT_EQ(line.find('\n'), std::string::npos);
    const json parsed = json::parse(line, nullptr, /*allow_exceptions=*/false);
    ASSERT_FALSE(parsed.is_discarded()) << line;
    EXPECT_EQ(parsed["message"], value);
    EXPECT_EQ(parsed["field"], value);
  }
}

TEST(LoggingTest, IllFormedBytesBecomeReplacementCharacters) {
  for (const std::string value :
       {"\x80", "\xC3", "\xC0\xAF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xFF"}) {
    const std::string line = Object(Line(LogFormat::kJson, "m", {{"v", value + "z"}}));
    const json parsed = json::parse(line, nullptr, false);
    ASSERT_FALSE(parsed.is_discarded()) << line;
    EXPECT_THAT(parsed["v"].get<std::string>(), HasSubstr("\xEF\xBF\xBD"));
    EXPECT_THAT(parsed["v"].get<std::string>(), EndsWith("z"));
  }
}

TEST(LoggingTest, NumbersAreValidJson) {
  const std::string line = Line(LogFormat::kJson, "m",
                                {{"big", std::numeric_limits<int64_t>::min()},
                                 {"nan", std::numeric_limits<double>::quiet_NaN()},
                                 {"inf", std::numeric_limits<double>::infinity()},
                                 {"tiny", 1e-9}});
  const json parsed = json::parse(Object(line), nullptr, false);
  ASSERT_FALSE(parsed.is_discarded()) << line;
  EXPECT_EQ(parsed["big"], std::numeric_limits<int64_t>::min());
  EXPECT_TRUE(parsed["nan"].is_null());
  EXPECT_TRUE(parsed["inf"].is_null());
  EXPECT_EQ(parsed["tiny"], 1e-9);
}

RequestSummary Summary() {
  RequestSummary summary;
  summary.id = 7;
  summary.request_id = "r-7\"";
  summary.method = "Generate";
  summary.peer = "ipv4:127.0.0.1:4242";
  summary.outcome = "stop";
  summary.prompt_tokens = 30;
  summary.output_tokens = 5;
  summary.queue_s = 0.001;
  summary.first_token_s = 0.02;
  summary.last_token_s = 0.06;
  summary.total_s = 0.061;
  return summary;
}

TEST(LoggingTest, ARequestIsOneJsonObjectALine) {
  StartLogging(LogLevel::kInfo, LogFormat::kJson);
  const std::string text = Captured([] {
    LogRequest(Summary());
    LogRequest(Summary());
  });
  const size_t end = text.find('\n');
  ASSERT_NE(end, std::string::npos);
  EXPECT_EQ(text.find('\n', end + 1), text.size() - 1);
  const json line = json::parse(text.substr(0, end), nullptr, false);
  ASSERT_FALSE(line.is_discarded()) << text;
  EXPECT_EQ(line["level"], "info");
  EXPECT_EQ(line["message"], "request");
  EXPECT_EQ(line["request_id"], "r-7\"");
  EXPECT_EQ(line["outcome"], "stop");
  EXPECT_EQ(line["prompt_tokens"], 30);
  EXPECT_EQ(line["output_tokens"], 5);
  EXPECT_EQ(line["per_token_s"], 0.01);
  EXPECT_THAT(line["time"].get<std::string>(), EndsWith("Z"));
  EXPECT_FALSE(line.contains("prompt"));
  EXPECT_FALSE(line.contains("error"));
}

TEST(LoggingTest, ThePromptIsLoggedOnlyIfTheSummaryHasIt) {
  StartLogging(LogLevel::kInfo, LogFormat::kText);
  RequestSummary summary = Summary();
  EXPECT_THAT(Captured([&] { LogRequest(summary); }), Not(HasSubstr(" prompt=")));
  summary.prompt = "my secret";
  EXPECT_THAT(Captured([&] { LogRequest(summary); }), HasSubstr("prompt=\"my secret\""));
}

TEST(LoggingTest, WhatNeverHappenedHasNoTime) {
  StartLogging(LogLevel::kInfo, LogFormat::kText);
  RequestSummary refused;
  refused.outcome = "queue_full";
  refused.error = "256 requests wait";
  const std::string line = Captured([&] { LogRequest(refused); });
  EXPECT_THAT(line, HasSubstr("outcome=queue_full error=\"256 requests wait\""));
  EXPECT_THAT(line, Not(HasSubstr("first_token_s")));
  EXPECT_THAT(line, Not(HasSubstr("queue_s")));
}

TEST(LoggingTest, LinesBelowTheLevelAreLeftOut) {
  StartLogging(LogLevel::kError, LogFormat::kText);
  EXPECT_EQ(Captured([] { LogRequest(Summary()); }), "");
  EXPECT_THAT(Captured([] { Log(LogLevel::kError, "lost", {{"device", "cpu"}}); }),
              HasSubstr("lost device=cpu"));
}

}  // namespace
}  // namespace espalier
