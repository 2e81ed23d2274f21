// Products of integers with AVX2, which has sums of two products in 16 bits. Included after
// lanes_avx2.h.
#pragma once

struct X {  // 4 activations, eight times
  __m256i value, magnitude;
};

// Integers: 2 rows by a pair. 4 integer and 4 fp32 sums, 2 weights, an activation twice.
constexpr int kDotRows = 2;
constexpr int kDotStrips = 1;
constexpr int kDotUnroll = 8;

// Bytes are made signed: two products of |activation| <= 127 and weight in -120 .. 120 fit 16 bits.
// Nibbles stay as they are, and all 8 quads of a group fit: 8 * 2 * 15 * 127 < 2^15.
constexpr bool kBytesInPlace = false;
constexpr int kByteOffset = 120;
void OpenBytes(const uint8_t* from, uint8_t* to) {
  for (int at = 0; at < 64; at += 32) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + at),
                       _mm256_sub_epi8(bytes, _mm256_set1_epi8(kByteOffset)));
  }
}
// A group of bytes starts at what their offset takes from it: `count` is the activations' sum.
template <bool kNibbles>
Sum StartSum(int32_t count) {
  const __m256i start = _mm256_set1_epi32(kNibbles ? 0 : kByteOffset * count);
  return {start, start};
}
// Signed bytes, above -128.
W LoadSigned(const uint8_t* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
Sum StartSigned(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
X LoadActivations(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  const __m256i value = _mm256_set1_epi32(four);
  return {value, _mm256_abs_epi8(value)};
}
// Bytes: |a| times w with a's sign. Nibbles: sums of pairs in 16 bits until the group ends.
template <bool kNibbles>
Sum Dot4(Sum sum, W w, X x) {
  const auto dot = [&](__m256i s, __m256i weights) {
    if (kNibbles) return _mm256_add_epi16(s, _mm256_maddubs_epi16(weights, x.value));
    const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(weights, x.value));
    return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  };
  return {dot(sum.lo, w.lo), dot(sum.hi, w.hi)};
}
template <bool kNibbles>
F FinishSum(Sum sum) {
  if (!kNibbles) return ToFloat(sum);
  const __m256i ones = _mm256_set1_epi16(1);
  return ToFloat(I{_mm256_madd_epi16(sum.lo, ones), _mm256_madd_epi16(sum.hi, ones)});
}
