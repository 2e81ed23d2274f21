// Products on AMX tiles against those on lanes, bit for bit, on any machine: the tiles are a
// model's. Where the processor has tiles, the other tests of kernels run them.
#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/weight_blocks.h"
#include "tests/kernels/tiles_on_model.h"

namespace espalier {
namespace {

// Memory on a 64-byte boundary, as lanes want it.
template <typename T>
struct Aligned {
  explicit Aligned(size_t count)
      : storage(count * sizeof(T) + 64),
        data(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64)) {}

  std::vector<uint8_t> storage;
  T* data;
};

struct Shape {
  int bits, rows, outputs, groups;
  bool part = false;  // of a weight with more groups, some
  bool bias = false;
  bool add = false;
};

// One task with random weights and rows; the last group is not full.
class Product {
 public:
  explicit Product(const Shape& shape)
      : shape_(shape),
        strip_bytes_((shape.part ? 2 * shape.groups + 1 : shape.groups) * BlockBytes(shape.bits)),
        stored_(kTaskStrips * strip_bytes_),
        values_(kMaxTaskRows * (shape.groups * kGroup + kPad)) {
    std::mt19937 random(shape.rows * 1000 + shape.outputs);
    std::normal_distribution<float> normal;
    const int depth = shape.groups * kGroup - 5;
    const int64_t blocks = kTaskStrips * strip_bytes_ / BlockBytes(shape.bits);
    for (int64_t i = 0; i < blocks; ++i) {
      float block[kGroup][kStripOutputs];
      for (auto& row : block) {
        for (float& v : row) v = normal(random);
      }
      EXPECT_TRUE(PackBlock(PortableKernels(), shape.bits, block, kGroup,
                            stored_.data + i * BlockBytes(shape.bits)));
    }
    scales_.resize(shape.rows * shape.groups);
    sums_.resize(scales_.size());
    counts_.resize(scales_.size());
    for (int r = 0; r < shape.rows; ++r) {
      std::vector<float> x(depth);
      for (float& v : x) v = normal(random);
      const size_t at = static_cast<size_t>(r) * shape.groups;
      PortableKernels().quantize_row(x.data(), depth, values_.data + r * stride(), &scales_[at],
                                     &sums_[at], &counts_[at]);
    }
    for (int i = 0; i < kTaskOutputs; ++i) bias_.push_back(normal(random));
    for (int i = 0; i < shape.rows * (kTaskOutputs + 3); ++i) start_.push_back(normal(random));
  }

  template <typename MatMul>
  std::vector<float> Run(const MatMul& matmul) const {
    std::vector<float> out = start_;
    Aligned<MatMulScratch> scratch(1);
    matmul(MatMulTask{.bits = shape_.bits,
                      .strips = stored_.data,
                      .strip_bytes = strip_bytes_,
                      .groups = shape_.groups,
                      .depth = shape_.groups * kGroup - 5,
                      .outputs = shape_.outputs,
                      .rows = shape_.rows,
                      .q = {.values = values_.data,
                            .stride = stride(),
                            .scales = const_cast<float*>(scales_.data()),
                            .sums = const_cast<float*>(sums_.data()),
                            .counts = const_cast<int32_t*>(counts_.data()),
                            .groups = shape_.groups},
                      .out = out.data(),
                      .out_stride = kTaskOutputs + 3,
                      .bias = shape_.bias ? bias_.data() : nullptr,
                      .add = shape_.add},
           scratch.data);
    return out;
  }

 private:
  static constexpr int kPad = 64;
  int64_t stride() const { return shape_.groups * kGroup + kPad; }

  Shape shape_;
  int64_t strip_bytes_;
  Aligned<uint8_t> stored_;
  Aligned<int8_t> values_;
  std::vector<float> scales_, sums_, bias_, start_;
  std::vector<int32_t> counts_;
};

// Tiles of the rows that are not left to lanes, for every strip and group.
int64_t ExpectedDots(const Shape& shape) {
  if (shape.bits > 8 || shape.rows < 16) return 0;
  const int tiles = shape.rows / 16 + (shape.rows % 16 > 3 ? 1 : 0);
  return int64_t{tiles} * ((shape.outputs + 15) / 16) * shape.groups;
}

using MatMulOnTiles = int64_t (*)(const MatMulTask&, MatMulScratch*);

void ExpectSameBits(const KernelTable& kernels, MatMulOnTiles on_tiles) {
  int turn = 0;
  for (const int bits : {8, 4}) {
    for (const int rows : {1, 15, 16, 19, 20, 33, 47, 128}) {
      for (const int outputs : {1, 17, 40, 64}) {
        // One and several chunks of kChunkGroups, whole and not.
        for (const int groups : {1, 8, 9, 18}) {
          const Shape shape = {bits,          rows,          outputs,      groups,
                               turn % 2 == 1, turn % 3 == 0, turn % 5 == 0};
          ++turn;
          const Product product(shape);
          const std::vector<float> want = product.Run(kernels.matmul);
          int64_t dots = 0;
          const std::vector<float> got =
              product.Run([&](const MatMulTask& task, MatMulScratch* scratch) {
                dots = on_tiles(task, scratch);
              });
          const std::string what =
              fmt::format("{} bits, {} rows, {} outputs, {} groups{}", bits, rows, outputs, groups,
                          shape.part ? ", the first of more groups" : "");
          ASSERT_EQ(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)), 0) << what;
          ASSERT_EQ(dots, ExpectedDots(shape)) << what;
        }
      }
    }
  }
}

TEST(Tiles, GiveTheBitsOfPortableLanes) {
  ExpectSameBits(PortableKernels(), MatMulOnModelTilesPortable);
}

#if defined(__x86_64__)
TEST(Tiles, GiveTheBitsOfAvx512Lanes) {
  const std::vector<Isa> isas = SupportedIsas();
  if (std::find(isas.begin(), isas.end(), Isa::kAvx512Vnni) == isas.end()) {
    GTEST_SKIP() << "no AVX-512 on this machine";
  }
  ExpectSameBits(Avx512Kernels(), MatMulOnModelTilesAvx512);
}
#endif

// The extremes of both factors, where a sign taken wrongly shows: 32 * 127 * 240.
TEST(Tiles, MultiplySignedBySteps) {
  for (const int sign : {1, -1}) {
    MatMulTask task{.bits = 8, .groups = 1, .depth = kGroup, .outputs = 16, .rows = 16};
    Aligned<uint8_t> strip(BlockBytes(8));
    float block[kGroup][kStripOutputs];
    for (int k = 0; k < kGroup; ++k) std::fill_n(block[k], kStripOutputs, k == 0 ? 0.0f : 240.0f);
    ASSERT_TRUE(PackBlock(PortableKernels(), 8, block, kGroup, strip.data));
    task.strips = strip.data;
    std::vector<int8_t> values(16 * kGroup, static_cast<int8_t>(127 * sign));
    std::vector<float> ones(16, 1.0f), sums(16), out(16 * 16);
    std::vector<int32_t> counts(16);
    task.q = {.values = values.data(),
              .stride = kGroup,
              .scales = ones.data(),
              .sums = sums.data(),
              .counts = counts.data(),
              .groups = 1};
    task.out = out.data();
    task.out_stride = 16;
    Aligned<MatMulScratch> scratch(1);
    EXPECT_EQ(MatMulOnModelTilesPortable(task, scratch.data), 1);
    EXPECT_EQ(out, std::vector<float>(16 * 16, sign * 31.0f * 127 * 240));
  }
}

}  // namespace
}  // namespace espalier
