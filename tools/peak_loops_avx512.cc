#include <immintrin.h>

#include "tools/peak_loops.h"

namespace espalier {
namespace {

// Independent sums: latency 4 to 5 times 2 ports, with room to spare in 32 registers.
constexpr int kSums = 20;

double F32Peak(int64_t iterations) {
  __m512 sum[kSums] = {};
  for (__m512& s : sum) asm volatile("" : "+v"(s));  // else all are one
  __m512 a = _mm512_set1_ps(0.999f);
  __m512 b = _mm512_set1_ps(1e-3f);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 20
    for (int s = 0; s < kSums; ++s) sum[s] = _mm512_fmadd_ps(sum[s], a, b);
  }
  for (__m512& s : sum) asm volatile("" : : "v"(s));
  return 2.0 * 16 * kSums * static_cast<double>(iterations);
}

double Int8Peak(int64_t iterations) {
  __m512i sum[kSums] = {};
  for (__m512i& s : sum) asm volatile("" : "+v"(s));
  __m512i a = _mm512_set1_epi8(3);
  __m512i b = _mm512_set1_epi8(5);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 20
    for (int s = 0; s < kSums; ++s) sum[s] = _mm512_dpbusd_epi32(sum[s], a, b);
  }
  for (__m512i& s : sum) asm volatile("" : : "v"(s));
  return 2.0 * 64 * kSums * static_cast<double>(iterations);
}

}  // namespace

const PeakLoops kAvx512PeakLoops = {.f32 = F32Peak, .int8 = Int8Peak};

}  // namespace espalier
