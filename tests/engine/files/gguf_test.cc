#include "engine/model/files/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string FaultOf(std::string_view bytes) {
  return std::string(ParseGguf("f.gguf", bytes).status().message());
}

GgufTensorPart Floats(std::string name, std::vector<uint64_t> dims) {
  uint64_t count = 1;
  for (const uint64_t dim : dims) count *= dim;
  return {.name = std::move(name), .dims = std::move(dims), .data = std::string(count * 4, '\1')};
}

TEST(Gguf, ReadsKeysAndTensorsSortedByName) {
  GgufParts parts;
  parts.keys = {{"count", GgufPart::U32(7)},
                {"rate", GgufPart::F32(0.5f)},
                {"flag", GgufPart::Bool(true)},
                {"text", GgufPart::Text("hello")},
                {"texts", GgufPart::Texts({"a", "", "ccc"})},
                {"numbers", GgufPart::Integers({-1, 2})}};
  parts.tensors = {Floats("z", {3}), Floats("a", {4, 2})};
  const std::string bytes = parts.Bytes();
  const auto gguf = ParseGguf("f.gguf", bytes);
  ASSERT_TRUE(gguf.ok()) << gguf.status();

  const std::string path = "f.gguf";
  GgufKeys keys(path, *gguf);
  EXPECT_EQ(keys.Integer("count", 0, 7), 7);
  EXPECT_EQ(keys.Positive("rate", 1), 0.5);
  EXPECT_TRUE(keys.Bool("flag", false));
  EXPECT_EQ(keys.String("text"), "hello");
  EXPECT_THAT(keys.Strings("texts", 3), ElementsAre("a", "", "ccc"));
  EXPECT_THAT(keys.Integers("numbers", 2), ElementsAre(-1, 2));
  EXPECT_EQ(keys.Integer("missing", 0, 9, 5), 5);
  EXPECT_TRUE(keys.status().ok()) << keys.status();

  ASSERT_EQ(gguf->tensors.size(), 2);
  EXPECT_EQ(gguf->tensors[0].name, "a");
  EXPECT_EQ(gguf->tensors[0].rows, 2);
  EXPECT_EQ(gguf->tensors[0].cols, 4);
  EXPECT_EQ(gguf->tensors[0].bytes, 32);
  EXPECT_EQ(gguf->tensors[1].rows, 1);
  EXPECT_EQ(gguf->tensors[1].cols, 3);
  const auto* last = reinterpret_cast<const std::byte*>(bytes.data() + bytes.size());
  EXPECT_EQ(gguf->tensors[0].data + 32, last);
}

TEST(GgufKeys, NameTheKeyAndKeepTheFirstFault) {
  GgufParts parts;
  parts.keys = {{"count", GgufPart::U32(7)},
                {"huge", {10, std::string(8, '\xff')}},
                {"minus", {11, std::string(8, '\xff')}},
                {"not a number", GgufPart::F32(__builtin_nanf(""))},
                {"text", GgufPart::Text("x")},
                {"numbers", GgufPart::Integers({1})},
                {"texts", GgufPart::Texts({"a", "b"})}};
  const std::string bytes = parts.Bytes();
  const auto gguf = ParseGguf("f", bytes);
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const std::string path = "f";
  const auto fault = [&](auto read) {
    GgufKeys keys(path, *gguf);
    read(keys);
    keys.String("missing");
    return std::string(keys.status().message());
  };
  EXPECT_EQ(fault([](GgufKeys& k) { k.Integer("count", 1, 6); }),
            "f: key \"count\": expected an integer in 1..6, got 7");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Integer("huge", 1, 6); }),
            "f: key \"huge\": expected an integer in 1..6, got 9223372036854775807");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Integer("minus", 0, 6); }),
            "f: key \"minus\": expected an integer in 0..6, got -1");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Integer("text", 1, 6); }),
            "f: key \"text\": expected an integer in 1..6, got string");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Positive("count", 1); }),
            "f: key \"count\": expected a float, got uint32");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Positive("not a number", 1); }),
            "f: key \"not a number\": expected a 32-bit float above 0 and at most 1, got nan");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Bool("count", false); }),
            "f: key \"count\": expected a bool, got uint32");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Strings("numbers", 9); }),
            "f: key \"numbers\": expected an array of strings, got array");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Integers("text", 9); }),
            "f: key \"text\": expected an array of integers, got string");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Integers("numbers", 0); }),
            "f: key \"numbers\": expected at most 0 elements, got 1");
  EXPECT_EQ(fault([](GgufKeys& k) { k.Strings("texts", 1); }),
            "f: key \"texts\": expected at most 1 elements, got 2");
  EXPECT_EQ(fault([](GgufKeys&) {}), "f: key \"missing\": expected a value, got none");
}

TEST(Gguf, RefusesAForeignStart) {
  EXPECT_EQ(FaultOf(""), "f.gguf: offset 0: expected \"GGUF\", got \"\"");
  EXPECT_EQ(FaultOf("ELF\n...."), "f.gguf: offset 0: expected \"GGUF\", got \"ELF\\n\"");
  EXPECT_EQ(FaultOf("GGUF\3"),
            "f.gguf: offset 4: version: expected 4 bytes, got 1 until the end of the file");
  EXPECT_EQ(FaultOf(GgufParts{.version = 1}.Bytes()),
            "f.gguf: offset 4: version: expected 2 or 3, got 1");
}

TEST(Gguf, BoundsCountsByWhatTheFileCanHold) {
  GgufParts parts;
  parts.tensors = {Floats("a", {8})};
  parts.tensor_count = UINT64_MAX;
  EXPECT_EQ(FaultOf(parts.Bytes()),
            "f.gguf: offset 8: number of tensors: expected at most 3 in what is left of the file, "
            "got 18446744073709551615");
  parts.tensor_count = 1;
  parts.key_count = uint64_t{1} << 60;
  EXPECT_THAT(FaultOf(parts.Bytes()), HasSubstr("number of metadata keys: expected at most 5 "));

  // Arrays of numbers, of strings and of arrays that say they hold 2^61 elements.
  for (const char type : {'\4', '\10', '\11', '\14'}) {
    std::string bytes = {type, 0, 0, 0};
    bytes += std::string("\0\0\0\0\0\0\0\x20", 8);
    const GgufParts liar = {.keys = {{"liar", {9, bytes}}}};
    EXPECT_THAT(FaultOf(liar.Bytes()), HasSubstr("key \"liar\": expected at most "));
  }
}

TEST(Gguf, BoundsStringsByWhatTheFileCanHold) {
  const GgufParts parts = {.keys = {{"text", {8, std::string(8, '\xff')}}}};
  EXPECT_THAT(FaultOf(parts.Bytes()),
              HasSubstr("key \"text\": expected 18446744073709551615 bytes, got "));
}

TEST(Gguf, BoundsTheNestingOfArrays) {
  const auto nested = [](int depth) {
    std::string bytes;
    for (int i = 1; i < depth; ++i) bytes += std::string("\11\0\0\0\1\0\0\0\0\0\0\0", 12);
    return GgufParts{.keys = {{"deep", {9, bytes + std::string("\4\0\0\0\0\0\0\0\0\0\0\0", 12)}}}};
  };
  EXPECT_EQ(FaultOf(nested(4).Bytes()), "");
  EXPECT_THAT(FaultOf(nested(5).Bytes()), HasSubstr("key \"deep\": expected at most 4 nested"));
  EXPECT_THAT(FaultOf(nested(100000).Bytes()), HasSubstr("expected at most 4 nested"));
}

TEST(Gguf, RefusesKeysAndTensorsThatAreThereTwice) {
  GgufParts parts;
  parts.keys = {{"key", GgufPart::U32(1)}, {"key", GgufPart::U32(2)}};
  EXPECT_EQ(FaultOf(parts.Bytes()), "f.gguf: key \"key\": expected it once, got it twice");
  parts.keys.clear();
  parts.tensors = {Floats("a", {8}), Floats("a", {8})};
  EXPECT_EQ(FaultOf(parts.Bytes()), "f.gguf: tensor \"a\": expected it once, got it twice");
}

TEST(Gguf, RefusesTypesItDoesNotKnow) {
  const GgufParts unknown = {.keys = {{"key", {13, "...."}}}};
  EXPECT_THAT(FaultOf(unknown.Bytes()), HasSubstr("key \"key\": expected a type of 0..12, got 13"));
  GgufParts parts;
  parts.tensors = {Floats("a", {256})};
  parts.tensors[0].type = 11;
  EXPECT_EQ(FaultOf(parts.Bytes()),
            "f.gguf: tensor \"a\": type 11 (Q3_K) is not supported, only F32, F16, BF16, Q8_0, "
            "Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K");
  parts.tensors[0].type = 4000000000;
  EXPECT_THAT(FaultOf(parts.Bytes()), HasSubstr("type 4000000000 is not supported"));
}

TEST(Gguf, RefusesShapesThatCannotBe) {
  const auto fault = [](std::vector<uint64_t> dims, uint32_t type = 0) {
    const GgufTensorPart tensor = {
        .name = "a", .dims = std::move(dims), .type = type, .data = std::string(64, '\0')};
    return FaultOf(GgufParts{.tensors = {tensor}}.Bytes());
  };
  EXPECT_EQ(fault({4, 4, 1, 1}), "");
  EXPECT_THAT(fault({}), HasSubstr("\"a\": expected 1 to 4 dimensions, got 0"));
  EXPECT_THAT(fault({1, 1, 1, 1, 1}), HasSubstr("expected 1 to 4 dimensions, got 5"));
  EXPECT_THAT(fault({4, 0}), HasSubstr("expected dimension 1 in 1..2147483647, got 0"));
  EXPECT_THAT(fault({uint64_t{1} << 62, 4}), HasSubstr("got 4611686018427387904"));
  EXPECT_THAT(fault({2, 2, 2}), HasSubstr("expected a vector or a matrix, got dimension 2 of 2"));
  EXPECT_THAT(fault({16, 2}, 8), HasSubstr("rows of a multiple of 32 values for Q8_0, got 16"));
  // The largest product there can be does not wrap.
  EXPECT_THAT(
      fault({2147483647, 2147483647}),
      HasSubstr("expected 18446744056529682436 bytes at offset 0 of the data, got data of"));
}

TEST(Gguf, RefusesDataOutsideTheFile) {
  GgufParts parts;
  parts.tensors = {Floats("a", {8})};
  for (const uint64_t offset : {uint64_t{32}, uint64_t{1} << 40, UINT64_MAX - 31}) {
    parts.tensors[0].offset = offset;
    EXPECT_THAT(FaultOf(parts.Bytes()), HasSubstr("tensor \"a\": expected 32 bytes at offset "));
  }
  parts.tensors[0].offset = 4;
  EXPECT_EQ(FaultOf(parts.Bytes()),
            "f.gguf: tensor \"a\": expected an offset that is a multiple of 32, got 4");
}

TEST(Gguf, RefusesTensorsThatShareBytes) {
  GgufParts parts;
  parts.tensors = {Floats("a", {16}), Floats("b", {16})};
  EXPECT_EQ(FaultOf(parts.Bytes()), "");
  parts.tensors[1].offset = 32;
  EXPECT_EQ(FaultOf(parts.Bytes()),
            "f.gguf: tensor \"b\": expected data of its own, got bytes of tensor \"a\"");
}

TEST(Gguf, TakesItsAlignmentFromTheFile) {
  GgufParts parts;
  parts.tensors = {Floats("a", {8})};
  parts.tensors[0].offset = 4;
  parts.tensors[0].data = std::string(64, '\1');
  parts.Set("general.alignment", GgufPart::U32(4));
  EXPECT_EQ(FaultOf(parts.Bytes()), "");
  parts.Set("general.alignment", GgufPart::U32(12));
  EXPECT_THAT(FaultOf(parts.Bytes()), HasSubstr("expected a power of two, got 12"));
  parts.Set("general.alignment", GgufPart::U32(0));
  EXPECT_THAT(FaultOf(parts.Bytes()), HasSubstr("\"general.alignment\": expected an integer in"));
}

}  // namespace
}  // namespace espalier
