// What the kernel tests share: the instruction sets to run on, random data, comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/reference_ops.h"

namespace espalier {

struct KernelCase {
  Isa isa;
  WeightType type;
};

inline std::vector<KernelCase> AllKernelCases() {
  std::vector<KernelCase> cases;
  for (Isa isa : SupportedIsas()) {
    for (WeightType type :
         {WeightType::kF32, WeightType::kBf16, WeightType::kInt8, WeightType::kInt4})
      cases.push_back({isa, type});
  }
  return cases;
}

inline std::string KernelCaseName(const ::testing::TestParamInfo<KernelCase>& info) {
  constexpr const char* kNames[] = {"fp32", "bf16", "int8", "int4"};
  return fmt::format("{}_{}", IsaName(info.param.isa), kNames[static_cast<int>(info.param.type)]);
}

inline std::string IsaCaseName(const ::testing::TestParamInfo<Isa>& info) {
  return std::string(IsaName(info.param));
}

inline std::unique_ptr<Backend> MakeBackend(Isa isa, int threads = 2) {
  return CreateCpuBackend({.isa = isa, .threads = threads}).value();
}

inline std::vector<float> RandomValues(int64_t count, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

inline reference::HostWeight RandomWeight(WeightType type, WeightLayout layout, int rows, int cols,
                                          uint32_t seed) {
  reference::HostWeight weight = {type, layout, rows, cols,
                                  RandomValues(int64_t{rows} * cols, seed)};
  if (type != WeightType::kInt4) return weight;
  // As a 4-bit file has them: a scale and a minimum for each group and output, both ends in use.
  std::mt19937 random(seed);
  const bool output_rows = layout == WeightLayout::kOutputRows;
  const int outputs = output_rows ? rows : cols, depth = output_rows ? cols : rows;
  for (int n = 0; n < outputs; ++n) {
    float scale = 0, minimum = 0;
    for (int k = 0; k < depth; ++k) {
      const int i = k % kQuantGroup;
      if (i == 0) {
        scale = static_cast<float>(1 + random() % 63) / 256;
        minimum = -static_cast<float>(random() % 32) / 16;
      }
      const auto u = static_cast<float>(i == 0 ? 0 : i == 1 ? 15 : random() % 16);
      weight.values[output_rows ? n * depth + k : k * outputs + n] = scale * u + minimum;
    }
  }
  return weight;
}

inline Weight Upload(Backend* backend, const reference::HostWeight& host) {
  const bool output_rows = host.layout == WeightLayout::kOutputRows;
  absl::StatusOr<Weight> weight = backend->UploadWeight(
      host.type, host.layout, host.rows, host.cols, {[&](int n, float* to) {
        const float* from = host.values.data() + (output_rows ? int64_t{n} * host.cols : n);
        for (int k = 0; k < (output_rows ? host.cols : host.rows); ++k) {
          to[k] = from[output_rows ? k : int64_t{k} * host.cols];
        }
      }});
  EXPECT_TRUE(weight.ok()) << weight.status();
  return *std::move(weight);
}

inline ConstMatrix View(const std::vector<float>& v, int rows, int cols) {
  return ConstMatrix(v.data(), rows, cols);
}

// The largest difference, in units of the expected values' root mean square (1 if they are all 0),
// must not exceed `tolerance`; a failure tells the worst place.
inline void ExpectNear(std::span<const float> got, std::span<const double> want, double tolerance,
                       int cols, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double squares = 0;
  for (double w : want) squares += w * w;
  const double rms = squares > 0 ? std::sqrt(squares / static_cast<double>(want.size())) : 1;
  size_t worst = 0;
  double error = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = std::abs(got[i] - want[i]) / rms;
    if (!(e <= error)) {  // also when NaN
      error = e;
      worst = i;
    }
  }
  EXPECT_LE(error, tolerance) << what << ": worst at row " << worst / std::max(1, cols)
                              << ", column " << worst % std::max(1, cols) << ": got " << got[worst]
                              << ", expected " << want[worst];
}

inline bool BitEqual(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

// 0, 1, .. n - 1.
inline std::vector<int32_t> Natural(int n) {
  std::vector<int32_t> list(n);
  std::iota(list.begin(), list.end(), 0);
  return list;
}

// Lists of every kind of some of n rows.
inline std::vector<std::pair<std::string, std::vector<int32_t>>> RowLists(int n) {
  const std::vector<int32_t> all = Natural(n), reversed(all.rbegin(), all.rend());
  std::vector<int32_t> some;
  for (int i = 0; i < n; ++i) {
    if (i % 3 != 1) some.push_back((i * 7 + 3) % n);
  }
  std::sort(some.begin(), some.end());
  some.erase(std::unique(some.begin(), some.end()), some.end());
  std::shuffle(some.begin(), some.end(), std::mt19937(5));
  return {{"all", all}, {"reversed", reversed}, {"some", some}, {"one", {n / 2}}, {"none", {}}};
}

}  // namespace espalier
