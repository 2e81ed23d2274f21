// The 2:4 kernels of kernels/cuda, on the emulator, beside kernels/sparse24.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/sparse24.h"
#include "kernels/sparse24.h"
#include "tests/simt/sparse24_on_simt.h"

namespace espalier {
namespace {

using simt::PackedOnSimt;
using simt::PackOnSimt;
using simt::UnpackedOnSimt;
using simt::UnpackOnSimt;
using testing::HasSubstr;
using testing::IsEmpty;

struct Shape {
  int outputs;
  int depth;
};

// A seed chooses the matrix and the order of threads.
class CudaSparse24Test : public testing::TestWithParam<std::tuple<Shape, uint32_t>> {
 protected:
  const int outputs_ = std::get<0>(GetParam()).outputs;
  const int depth_ = std::get<0>(GetParam()).depth;
  const int groups_ = depth_ / kSparseGroup;
  const uint32_t seed_ = std::get<1>(GetParam());
  const std::vector<uint16_t> values_ = simt::RandomSparse24(outputs_, depth_, seed_);

  PackedOnSimt Pack(const std::vector<uint16_t>& values) const {
    return PackOnSimt(&cuda::PackSparse24, values, outputs_, depth_, seed_);
  }
  UnpackedOnSimt Unpack(const Sparse24& sparse) const {
    return UnpackOnSimt(&cuda::UnpackSparse24, sparse, seed_);
  }
};

#define EXPECT_NO_FAULTS(faults) EXPECT_THAT(faults, IsEmpty()) << (faults)[0].text

TEST_P(CudaSparse24Test, PacksAsTheCpuDoesAndUnpacks) {
  const Sparse24 expected = CompressSparse24(values_, outputs_, depth_).value();
  const PackedOnSimt packed = Pack(values_);
  EXPECT_NO_FAULTS(packed.faults);
  EXPECT_EQ(packed.error, 0);
  EXPECT_EQ(packed.refused, cuda::kNoneRefused);
  EXPECT_EQ(packed.sparse.kept, expected.kept);
  EXPECT_EQ(packed.sparse.places, expected.places);

  const UnpackedOnSimt unpacked = Unpack(packed.sparse);
  EXPECT_NO_FAULTS(unpacked.faults);
  EXPECT_EQ(unpacked.error, 0);
  EXPECT_EQ(unpacked.refused, cuda::kNoneRefused);
  EXPECT_EQ(unpacked.values, ExpandSparse24(packed.sparse).value());
  // Zeros that are left out come back without their sign.
  std::vector<uint16_t> values = values_;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] == 0x8000 && unpacked.values[i] == 0) values[i] = 0;
  }
  EXPECT_EQ(unpacked.values, values);
}

TEST_P(CudaSparse24Test, RefusesTheGroupThatTheCpuRefuses) {
  std::mt19937 random(seed_);
  for (const int count : {1, 7, outputs_ * groups_}) {
    std::vector<uint16_t> values = values_;
    for (int i = 0; i < count; ++i) {
      // NaN counts as a value, and a zero with a sign as none.
      const std::vector<uint16_t> group = {1, 0x7fff, 0x8000, 0x8001};
      std::ranges::copy(group, values.begin() + random() % (outputs_ * groups_) * kSparseGroup);
    }
    const PackedOnSimt packed = Pack(values);
    EXPECT_NO_FAULTS(packed.faults);
    const int output = static_cast<int>(packed.refused / groups_);
    const int first = static_cast<int>(packed.refused % groups_) * kSparseGroup;
    EXPECT_THAT(CompressSparse24(values, outputs_, depth_).status().message(),
                HasSubstr(fmt::format("output {}, values {} to {}: ", output, first, first + 3)));
  }
}

TEST_P(CudaSparse24Test, RefusesThePlacesThatTheCpuRefuses) {
  std::mt19937 random(seed_);
  Sparse24 sparse = CompressSparse24(values_, outputs_, depth_).value();
  for (int i = 0; i < 3; ++i) {
    // Places that do not ascend, or that lie beyond the last group and are read by neither.
    uint16_t& word = sparse.places[random() % sparse.places.size()];
    word = static_cast<uint16_t>(i == 0 ? word | 0xf000 : random());
    const UnpackedOnSimt unpacked = Unpack(sparse);
    EXPECT_NO_FAULTS(unpacked.faults);
    const absl::StatusOr<std::vector<uint16_t>> expected = ExpandSparse24(sparse);
    if (expected.ok()) {
      EXPECT_EQ(unpacked.refused, cuda::kNoneRefused);
      EXPECT_EQ(unpacked.values, *expected);
    } else {
      EXPECT_THAT(expected.status().message(),
                  HasSubstr(fmt::format("output {}, group {}: ", unpacked.refused / groups_,
                                        unpacked.refused % groups_)));
    }
  }
}

std::string NameOf(const testing::TestParamInfo<std::tuple<Shape, uint32_t>>& info) {
  const auto& [shape, seed] = info.param;
  return fmt::format("{}x{}seed{}", shape.outputs, shape.depth, seed);
}

INSTANTIATE_TEST_SUITE_P(All, CudaSparse24Test,
                         testing::Combine(testing::Values(Shape{1, 4}, Shape{1, 16}, Shape{1, 20},
                                                          Shape{7, 12}, Shape{33, 4}, Shape{3, 576},
                                                          Shape{2, 1024}, Shape{2, 1028},
                                                          Shape{3, 1020}, Shape{1, 4096 + 36}),
                                          testing::Range(0U, 5U)),
                         NameOf);

TEST(CudaSparse24, TakesNoShapeThatIsNone) {
  constexpr int kInvalidValue = 1, kMost = std::numeric_limits<int>::max();
  const auto pack = [](int outputs, int depth) {
    return cuda::PackSparse24(nullptr, outputs, depth, nullptr, nullptr, nullptr, nullptr);
  };
  const auto unpack = [](int outputs, int depth) {
    return cuda::UnpackSparse24(nullptr, nullptr, outputs, depth, nullptr, nullptr, nullptr);
  };
  // Nothing to do is no error, and launches nothing.
  EXPECT_EQ(pack(0, 8), 0);
  EXPECT_EQ(pack(8, 0), 0);
  EXPECT_EQ(unpack(0, 8), 0);
  EXPECT_EQ(unpack(8, 0), 0);
  for (const auto& [outputs, depth] :
       {Shape{1, 6}, Shape{-1, 4}, Shape{1, -4}, Shape{kMost, kMost / 4 * 4}}) {
    EXPECT_EQ(pack(outputs, depth), kInvalidValue);
    EXPECT_EQ(unpack(outputs, depth), kInvalidValue);
  }
}

TEST(CudaSparse24, IsGivenNoMemoryOfTheHost) {
  simt::Device device(0);
  std::vector<uint16_t> values(4);
  std::vector<unsigned long long> refused = {cuda::kNoneRefused};
  cuda::PackSparse24(values.data(), 1, 4, device.Allocate<uint16_t>(2),
                     device.Allocate<uint16_t>(1), device.Upload(refused), device.stream());
  ASSERT_EQ(device.faults().size(), 1);
  EXPECT_EQ(device.faults()[0].kind, simt::FaultKind::kHostPointer);
}

}  // namespace
}  // namespace espalier
