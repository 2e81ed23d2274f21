#include "engine/model/files/json_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace espalier {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

std::string Fault(const absl::StatusOr<Json>& json) { return std::string(json.status().message()); }

TEST(ParseJson, NamesTheOffsetOfWhatIsNoJson) {
  EXPECT_EQ(Fault(ParseJsonObject("f", R"({"a": nope})")),
            R"(f: offset 7: expected JSON, got "ope}")");
  EXPECT_EQ(Fault(ParseJsonObject("f", R"({"a": )")), "f: offset 6: expected JSON, got the end");
  EXPECT_EQ(Fault(ParseJsonObject("f", "")), "f: offset 0: expected JSON, got the end");
  EXPECT_EQ(Fault(ParseJsonObject("f", "[1]")), "f: JSON: expected an object, got array");
  EXPECT_THAT(Fault(ParseJsonObject("f", R"({"a": 1e999})")),
              StartsWith("f: JSON: expected numbers"));
  EXPECT_THAT(Fault(ParseJsonObject("f", "{\"a\": \"\xff\"}")), HasSubstr("expected JSON"));
}

TEST(ParseJson, RefusesDeepNestingBeforeItRecurses) {
  const auto nested = [](int depth) {
    return "{\"a\": " + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}";
  };
  EXPECT_TRUE(ParseJsonObject("f", nested(64)).ok());
  EXPECT_EQ(Fault(ParseJsonObject("f", nested(65))),
            "f: JSON: expected at most 64 nested values, got 65");
  EXPECT_FALSE(ParseJsonObject("f", nested(1000000)).ok());
  EXPECT_TRUE(ParseJsonObject("f", R"({"a": "[[[[\"[[[["})").ok())
      << "brackets in strings are text";
}

TEST(JsonKeys, ReadsWhatIsThereAndFallsBackOnNull) {
  absl::Status status;
  const Json json = Json::parse(R"({"i": 3, "f": 2.5, "b": true, "s": "x", "n": null})");
  JsonKeys keys("f", "", json, &status);
  EXPECT_EQ(keys.Integer("i", 1, 3), 3);
  EXPECT_EQ(keys.Integer("n", 1, 3, 2), 2);
  EXPECT_EQ(keys.Positive("f", 10), 2.5);
  EXPECT_EQ(keys.Positive("i", 10), 3);
  EXPECT_TRUE(keys.Bool("b"));
  EXPECT_EQ(keys.String("s"), "x");
  EXPECT_EQ(keys.String("missing", "y"), "y");
  EXPECT_TRUE(status.ok()) << status;
}

TEST(JsonKeys, NamesFileAndKeyAndKeepsTheFirstFault) {
  const Json json = Json::parse(
      R"({"big": 18446744073709551615, "low": 0, "real": 1.5, "text": "a\nb", "zero": 0.0})");
  const auto fault = [&](auto read) {
    absl::Status status;
    JsonKeys keys("f", "group.", json, &status);
    read(keys);
    keys.Integer("missing", 0, 1);
    return std::string(status.message());
  };
  EXPECT_EQ(fault([](JsonKeys& k) { k.Integer("big", 1, 9); }),
            "f: key \"group.big\": expected an integer in 1..9, got 18446744073709551615");
  EXPECT_EQ(fault([](JsonKeys& k) { k.Integer("low", 1, 9); }),
            "f: key \"group.low\": expected an integer in 1..9, got 0");
  EXPECT_EQ(fault([](JsonKeys& k) { k.Integer("real", 1, 9); }),
            "f: key \"group.real\": expected an integer in 1..9, got 1.5");
  EXPECT_EQ(fault([](JsonKeys& k) { k.Bool("text"); }),
            "f: key \"group.text\": expected true or false, got \"a\\nb\"");
  EXPECT_EQ(fault([](JsonKeys& k) { k.Positive("zero", 1); }),
            "f: key \"group.zero\": expected a 32-bit float above 0 and at most 1, got 0.0");
  EXPECT_EQ(fault([](JsonKeys&) {}), "f: key \"group.missing\": expected a value, got none");
}

}  // namespace
}  // namespace espalier
