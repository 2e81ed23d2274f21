// Sixteen lanes in one AVX-512 register. Included by kernels_avx512.cc inside its own namespace.
#pragma once

using F = __m512;   // 16 fp32
using I = __m512i;  // 16 int32
using Sum = I;
using W = __m512i;  // 16 outputs by 4 weights
using X = __m512i;  // 4 activations, sixteen times

// Values summed in fp32: 4 rows by 4 registers. 16 sums, 4 weights and 1 activation of 32
// registers, and more independent sums than two FMA ports times four cycles of latency need.
constexpr int kFmaRows = 4;
constexpr int kVecs = 4;
// Integers: 3 rows by 4 strips. 12 integer and 12 fp32 sums, 4 weights and 1 activation.
constexpr int kDotRows = 3;
constexpr int kDotStrips = 4;
// Steps of the integer loop to write out: all. In a loop GCC 12 copies every sum of VPDPBUSD twice.
constexpr int kDotUnroll = 8;

__mmask16 First(int n) { return static_cast<__mmask16>((1u << n) - 1); }

F Load(const float* p) { return _mm512_loadu_ps(p); }
F LoadFirst(const float* p, int n) { return _mm512_maskz_loadu_ps(First(n), p); }
void Store(float* p, F v) { _mm512_storeu_ps(p, v); }
void StoreFirst(float* p, F v, int n) { _mm512_mask_storeu_ps(p, First(n), v); }
F Set1(float v) { return _mm512_set1_ps(v); }
F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Of a and b, b if either is NaN.
F Max(F a, F b) { return _mm512_max_ps(a, b); }
F Min(F a, F b) { return _mm512_min_ps(a, b); }
F Abs(F v) { return _mm512_abs_ps(v); }
F Round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
F TimesPowerOf2(F v, F n) { return _mm512_scalef_ps(v, n); }
F KeepFirst(F v, int n, F other) { return _mm512_mask_mov_ps(other, First(n), v); }
int FirstEqual(F a, F b) {
  const unsigned mask = _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  return mask ? __builtin_ctz(mask) : -1;
}
float ReduceMax(F v) { return _mm512_reduce_max_ps(v); }
float ReduceAdd(F v) { return _mm512_reduce_add_ps(v); }
F LoadHalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
void StoreHalf(uint16_t* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
uint16_t ToHalf(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
float FromHalf(uint16_t v) { return _cvtsh_ss(v); }

I ToInt(F v) { return _mm512_cvtps_epi32(v); }
F ToFloat(I v) { return _mm512_cvtepi32_ps(v); }
I Add(I a, I b) { return _mm512_add_epi32(a, b); }
int32_t ReduceAdd(I v) { return _mm512_reduce_add_epi32(v); }
void StoreInt8(int8_t* p, I v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
}

// Sixteen pairs of bf16, which is the upper half of fp32: the first of each, and the second.
void LoadPairs(const uint8_t* p, F* first, F* second) {
  const __m512i pairs = _mm512_load_si512(p);
  *first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  *second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
}

F LoadField(const uint8_t* p, int shift, int mask) {
  const __m512i words = _mm512_srli_epi32(_mm512_load_si512(p), static_cast<unsigned>(shift));
  return ToFloat(_mm512_and_si512(words, _mm512_set1_epi32(mask)));
}
void StoreQuads(uint8_t* p, const F (&v)[4]) {
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(ToInt(v[0]), ToInt(v[1])),
                                            _mm512_packs_epi32(ToInt(v[2]), ToInt(v[3])));
  // Of four outputs they lie by input: [4][4] to be turned.
  const __m512i turn =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  _mm512_store_si512(p, _mm512_shuffle_epi8(bytes, turn));
}
// As picks_by_lane.h.
struct Picks {
  __m512i words;
  __m256i halves;
  __mmask16 lanes;
};
Picks PickLanes(const int32_t* from, int begin, int end) {
  const __m512i words = _mm512_loadu_si512(from);
  return {.words = words,
          .halves = _mm512_cvtepi32_epi16(words),
          .lanes = static_cast<__mmask16>(First(end) & ~First(begin))};
}
void PickWords(const Picks& picks, const uint8_t* source, uint8_t* to) {
  const __m512i all = _mm512_permutexvar_epi32(picks.words, _mm512_load_si512(source));
  _mm512_mask_storeu_epi32(to, picks.lanes, all);
}
void PickHalves(const Picks& picks, const uint8_t* source, uint8_t* to) {
  const __m256i* from = reinterpret_cast<const __m256i*>(source);
  const __m256i all = _mm256_permutexvar_epi16(picks.halves, _mm256_load_si256(from));
  _mm256_mask_storeu_epi16(to, picks.lanes, all);
}

F LoadInt8(const int8_t* p) {
  return ToFloat(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Bytes and nibbles are unsigned here, as VNNI wants the one of its factors.
constexpr bool kBytesInPlace = true;
void OpenBytes(const uint8_t*, uint8_t*) {}
// 64 nibbles from the low halves, 64 from the high ones.
void OpenNibbles(const uint8_t* from, uint8_t* low, uint8_t* high) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i both = _mm512_load_si512(from);
  _mm512_store_si512(low, _mm512_and_si512(both, mask));
  _mm512_store_si512(high, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
}
template <bool kNibbles>
Sum StartSum(int32_t) {
  return _mm512_setzero_si512();
}
// A sum that was made elsewhere.
[[maybe_unused]] Sum LoadSum(const int32_t* p) { return _mm512_load_si512(p); }
W LoadWeights(const uint8_t* p) { return _mm512_load_si512(p); }
// Signed bytes: their sum starts at what offsetting them takes from it.
W LoadSigned(const uint8_t* p) {
  return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
Sum StartSigned(int32_t count) { return _mm512_set1_epi32(-128 * count); }
X LoadActivations(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
template <bool kNibbles>
Sum Dot4(Sum sum, W w, X x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}
template <bool kNibbles>
F FinishSum(Sum sum) {
  return ToFloat(sum);
}
