#include "kernels/sparse24.h"

#include <cstdint>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(Sparse24, IsKnownByItsGroups) {
  EXPECT_TRUE(IsSparse24({}));
  EXPECT_TRUE(IsSparse24(std::vector{1.0f, 0.0f, -2.0f, 0.0f}));
  EXPECT_TRUE(IsSparse24(std::vector{0.0f, 0.0f, 0.0f, 0.0f, -0.0f, 0.0f, 1.0f, 1.0f}));
  EXPECT_FALSE(IsSparse24(std::vector{1.0f, 0.0f, 2.0f, 3.0f}));
  // Two of each four, but not of those that lie on multiples of four.
  EXPECT_FALSE(IsSparse24(std::vector{0.0f, 1.0f, 1.0f, 1.0f, 0.0f, 0.0f, 0.0f, 1.0f}));
  EXPECT_TRUE(IsSparse24(std::vector{1.0f, 1.0f, 0.0f, 0.0f, 1.0f, 1.0f}));
  EXPECT_FALSE(IsSparse24(std::vector{1.0f, 1.0f, 0.0f, 0.0f, 1.0f, 1.0f, 1.0f}));
  EXPECT_FALSE(IsSparse24(std::vector{1.0f, 1.0f, std::numeric_limits<float>::quiet_NaN(), 0.0f}));
}

TEST(Sparse24, LiesAsSparseTensorCoresWant) {
  // Places (0, 1) are 0b0100 and (2, 3) are 0b1110, the first group lowest.
  const std::vector<uint16_t> values = {7, 8, 0, 0, 0, 0, 5, 6, 0, 3, 0, 4, 0x8000, 0, 9, 0};
  const absl::StatusOr<Sparse24> sparse = CompressSparse24(values, 1, 16);
  ASSERT_TRUE(sparse.ok()) << sparse.status();
  EXPECT_THAT(sparse->kept, ElementsAre(7, 8, 5, 6, 3, 4, 9, 0));
  // (1, 3) is 0b1101; one alone at 2 stands before the zero at 3.
  EXPECT_THAT(sparse->places, ElementsAre(0b1110'1101'1110'0100));
}

TEST(Sparse24, ComesBackBitForBit) {
  std::mt19937 random(7);
  for (const int depth : {4, 12, 16, 20, 576}) {
    const int outputs = 9;
    std::vector<uint16_t> values(outputs * depth);
    for (size_t group = 0; group < values.size(); group += kSparseGroup) {
      for (uint32_t kept = random() % 3; kept > 0; --kept) {
        values[group + random() % kSparseGroup] = static_cast<uint16_t>(random() | 1);
      }
    }
    const absl::StatusOr<Sparse24> sparse = CompressSparse24(values, outputs, depth);
    ASSERT_TRUE(sparse.ok()) << sparse.status();
    EXPECT_EQ(sparse->kept.size(), values.size() / 2);
    const absl::StatusOr<std::vector<uint16_t>> again = ExpandSparse24(*sparse);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, values) << depth;
  }
}

TEST(Sparse24, RefusesWhatItIsNot) {
  EXPECT_THAT(
      CompressSparse24(std::vector<uint16_t>{0, 0, 0, 0, 0, 1, 2, 3}, 2, 4).status().message(),
      HasSubstr("output 1, values 0 to 3: expected at most 2 that are not zero, got 3"));
  EXPECT_THAT(CompressSparse24(std::vector<uint16_t>(6), 1, 6).status().message(),
              HasSubstr("6 values as 1 outputs of 6"));
  EXPECT_THAT(CompressSparse24(std::vector<uint16_t>(7), 2, 4).status().message(),
              HasSubstr("7 values as 2 outputs of 4"));
  Sparse24 sparse{.outputs = 1, .depth = 8, .kept = {1, 2, 3, 4}, .places = {0b0101'0100}};
  EXPECT_THAT(ExpandSparse24(sparse).status().message(),
              HasSubstr("output 0, group 1: expected places that ascend, got 1 and 1"));
  sparse.kept.pop_back();
  EXPECT_THAT(ExpandSparse24(sparse).status().message(), HasSubstr("3 values and 1 words"));
}

}  // namespace
}  // namespace espalier
