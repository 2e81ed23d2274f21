#include "engine/model/files/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::HasSubstr;

std::string FaultOf(std::string_view bytes) {
  return std::string(ParseSafetensors("f", bytes).status().message());
}

// The fault of a header over 16 bytes of data.
std::string FaultOfHeader(std::string_view header) {
  return FaultOf(SafetensorsBytes(header, std::string(16, '\1')));
}

TEST(Safetensors, PointIntoTheData) {
  const std::string bytes = SafetensorsBytes({{"vector", {3}, "F16", "aabbcc"},
                                              {"matrix", {2, 1}, "F32", "ddddeeee"},
                                              {"brain", {1, 1}, "BF16", "ff"}});
  const auto tensors = ParseSafetensors("f", bytes);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3);
  const StoredTensor& vector = (*tensors)[0];
  EXPECT_EQ(vector.name, "vector");
  EXPECT_EQ(vector.type, BlockType::kF16);
  EXPECT_EQ(vector.rows, 1);
  EXPECT_EQ(vector.cols, 3);
  EXPECT_EQ(std::string_view(reinterpret_cast<const char*>(vector.data), vector.bytes), "aabbcc");
  const StoredTensor& matrix = (*tensors)[1];
  EXPECT_EQ(matrix.type, BlockType::kF32);
  EXPECT_EQ(matrix.rows, 2);
  EXPECT_EQ(matrix.cols, 1);
  EXPECT_EQ(std::string_view(reinterpret_cast<const char*>(matrix.data), matrix.bytes), "ddddeeee");
  EXPECT_EQ((*tensors)[2].type, BlockType::kBF16);
}

TEST(Safetensors, BoundTheHeaderByTheFile) {
  EXPECT_EQ(FaultOf("1234567"),
            "f: offset 0: expected the 8 bytes of a header length, got a file of 7");
  EXPECT_EQ(FaultOf(std::string(8, '\xff') + "{}"),
            "f: offset 0: header length: expected at most the 2 bytes left, got "
            "18446744073709551615");
  EXPECT_THAT(FaultOfHeader("{"), HasSubstr("f: offset 1: expected JSON"));
}

TEST(Safetensors, RefuseTypesItDoesNotKnow) {
  EXPECT_EQ(FaultOfHeader(R"({"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}})"),
            "f: tensor \"a\": type \"I64\" is not supported, only F32, F16 and BF16");
  EXPECT_THAT(FaultOfHeader(R"({"a": 5})"), HasSubstr("type null is not supported"));
}

TEST(Safetensors, RefuseShapesThatCannotBe) {
  for (const char* shape : {"[]", "[0]", "[-4]", "[4.0]", "[1, 2, 2]", "[2147483648]", "\"4\"",
                            "[18446744073709551615, 18446744073709551615]", "null"}) {
    EXPECT_THAT(FaultOfHeader(std::string(R"({"a": {"dtype": "F32", "shape": )") + shape +
                              R"(, "data_offsets": [0, 16]}})"),
                HasSubstr("tensor \"a\": expected the shape of a vector or a matrix, got "))
        << shape;
  }
}

TEST(Safetensors, RefuseOffsetsThatDoNotFit) {
  const auto fault = [](const std::string& offsets) {
    return FaultOfHeader(R"({"a": {"dtype": "F32", "shape": [4], "data_offsets": )" + offsets +
                         "}}");
  };
  EXPECT_EQ(fault("[0, 16]"), "");
  for (const char* offsets : {"[0]", "[0, 17]", "[-1, 15]", "[0, 18446744073709551615]", "null"}) {
    EXPECT_THAT(fault(offsets), HasSubstr("expected two offsets into 16 bytes of data, got "))
        << offsets;
  }
  EXPECT_EQ(fault("[0, 12]"), "f: tensor \"a\": expected 16 bytes of F32, got offsets 0 to 12");
  EXPECT_EQ(fault("[16, 0]"), "f: tensor \"a\": expected 16 bytes of F32, got offsets 16 to 0");
}

TEST(Safetensors, RefuseGapsAndOverlaps) {
  const auto header = [](int first, int second) {
    return R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [)" + std::to_string(first) +
           ", " + std::to_string(first + 4) +
           R"(]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [)" + std::to_string(second) +
           ", " + std::to_string(second + 8) + "]}}";
  };
  EXPECT_EQ(FaultOf(SafetensorsBytes(header(0, 4), std::string(12, '\1'))), "");
  EXPECT_EQ(FaultOfHeader(header(0, 8)),
            "f: tensor \"b\": expected data right behind the tensor before, got 4 bytes off");
  EXPECT_EQ(FaultOfHeader(header(4, 0)).substr(0, 15), "f: tensor \"a\": ");
  EXPECT_EQ(FaultOfHeader(header(0, 4)),
            "f: end of the file: expected the last tensor's end, got 4 more bytes");
}

}  // namespace
}  // namespace espalier
