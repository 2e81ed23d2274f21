#include <immintrin.h>

#include "tools/peak_loops.h"

namespace espalier {
namespace {

// Independent sums: latency 4 to 5 times 2 ports, within 16 registers.
constexpr int kSums = 10;

double F32Peak(int64_t iterations) {
  __m256 sum[kSums] = {};
  for (__m256& s : sum) asm volatile("" : "+x"(s));  // else all are one
  __m256 a = _mm256_set1_ps(0.999f);
  __m256 b = _mm256_set1_ps(1e-3f);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 10
    for (int s = 0; s < kSums; ++s) sum[s] = _mm256_fmadd_ps(sum[s], a, b);
  }
  for (__m256& s : sum) asm volatile("" : : "x"(s));
  return 2.0 * 8 * kSums * static_cast<double>(iterations);
}

// The way of a machine without VNNI: u8 x s8 to s16 pairs, s16 pairs to s32, add.
double Int8Peak(int64_t iterations) {
  __m256i sum[kSums] = {};
  __m256i a = _mm256_set1_epi8(3);
  __m256i b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 10
    for (int s = 0; s < kSums; ++s) {
      asm volatile("" : "+x"(a), "+x"(b));  // else one product serves all sums
      sum[s] = _mm256_add_epi32(sum[s], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  }
  for (__m256i& s : sum) asm volatile("" : : "x"(s));
  return 2.0 * 32 * kSums * static_cast<double>(iterations);
}

// In its AVX encoding, which assemblers know by a prefix and GCC 12's intrinsics by a flag that
// would let it into the other loops.
double VnniPeak(int64_t iterations) {
  __m256i sum[kSums] = {};
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 10
    for (__m256i& s : sum) asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
  }
  return 2.0 * 32 * kSums * static_cast<double>(iterations);
}

}  // namespace

const PeakLoops kAvx2PeakLoops = {.f32 = F32Peak, .int8 = Int8Peak};
const PeakLoops kAvxVnniPeakLoops = {.f32 = F32Peak, .int8 = VnniPeak};

}  // namespace espalier
