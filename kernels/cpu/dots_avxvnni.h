// Products of integers with AVX-VNNI: VPDPBUSD on AVX2's registers. Included after lanes_avx2.h.
#pragma once

using X = __m256i;  // 4 activations, eight times

// 4 rows by a pair: 8 chains of a latency of 5 on two ports, 2 weights and an activation. The fp32
// sums are in memory meanwhile; beside them in registers, 4 chains would wait for each other.
constexpr int kDotRows = 4;
constexpr int kDotStrips = 1;
constexpr int kDotUnroll = 8;

// Bytes and nibbles are unsigned here, as VNNI wants the one of its factors.
constexpr bool kBytesInPlace = true;
void OpenBytes(const uint8_t*, uint8_t*) {}
template <bool kNibbles>
Sum StartSum(int32_t) {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
// Signed bytes: their sum starts at what offsetting them takes from it.
W LoadSigned(const uint8_t* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  const __m256i sign = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(_mm256_loadu_si256(from), sign),
          _mm256_xor_si256(_mm256_loadu_si256(from + 1), sign)};
}
Sum StartSigned(int32_t count) {
  const __m256i start = _mm256_set1_epi32(-128 * count);
  return {start, start};
}
X LoadActivations(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
template <bool kNibbles>
Sum Dot4(Sum sum, W w, X x) {
  return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x)};
}
template <bool kNibbles>
F FinishSum(Sum sum) {
  return ToFloat(sum);
}
