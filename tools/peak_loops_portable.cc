#include "tools/peak_loops.h"

namespace espalier {
namespace {

// Enough independent sums to hide latency, few enough to stay in registers of the base instruction
// set once the compiler has vectorised the inner loop.
constexpr int kLanes = 32;

double F32Peak(int64_t iterations) {
  float sum[kLanes] = {};
  asm volatile("" : : "r"(sum) : "memory");  // else all are one
  float factor = 0.999f;
  float addend = 1e-3f;
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+m"(factor), "+m"(addend));
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = sum[lane] * factor + addend;
  }
  asm volatile("" : : "r"(sum) : "memory");
  return 2.0 * kLanes * static_cast<double>(iterations);
}

double Int8Peak(int64_t iterations) {
  int8_t a[kLanes] = {};
  int8_t b[kLanes] = {};
  int32_t sum[kLanes] = {};
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += int32_t{a[lane]} * b[lane];
  }
  asm volatile("" : : "r"(sum) : "memory");
  return 2.0 * kLanes * static_cast<double>(iterations);
}

}  // namespace

const PeakLoops kPortablePeakLoops = {.f32 = F32Peak, .int8 = Int8Peak};

}  // namespace espalier
