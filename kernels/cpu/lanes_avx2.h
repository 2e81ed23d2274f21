// Sixteen lanes in two AVX2 registers. Included by kernels_avx2.cc and kernels_avxvnni.cc inside
// their own namespaces; how each multiplies integers is in dots_*.h.
#pragma once

struct F {  // 16 fp32
  __m256 lo, hi;
};
struct I {  // 16 int32
  __m256i lo, hi;
};
using Sum = I;
struct W {  // 16 outputs by 4 weights
  __m256i lo, hi;
};

// Values summed in fp32: 4 rows by one pair of registers. 8 sums, 2 weights and what a product
// needs of 16 registers.
constexpr int kFmaRows = 4;
constexpr int kVecs = 1;

F operator+(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
F operator-(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
F operator*(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
F operator/(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }

__m256i FirstOf8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

F Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
F LoadFirst(const float* p, int n) {
  return {_mm256_maskload_ps(p, FirstOf8(n)), _mm256_maskload_ps(p + 8, FirstOf8(n - 8))};
}
void Store(float* p, F v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
void StoreFirst(float* p, F v, int n) {
  _mm256_maskstore_ps(p, FirstOf8(n), v.lo);
  _mm256_maskstore_ps(p + 8, FirstOf8(n - 8), v.hi);
}
F Set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
F Fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// Of a and b, b if either is NaN.
F Max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
F Min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
F Abs(F v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.lo), _mm256_andnot_ps(sign, v.hi)};
}
F Round(F v) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, kNearest), _mm256_round_ps(v.hi, kNearest)};
}
// n whole, in [-126, 127].
F TimesPowerOf2(F v, F n) {
  const auto power = [](__m256 e) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(e), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  };
  return v * F{power(n.lo), power(n.hi)};
}
F KeepFirst(F v, int n, F other) {
  return {_mm256_blendv_ps(other.lo, v.lo, _mm256_castsi256_ps(FirstOf8(n))),
          _mm256_blendv_ps(other.hi, v.hi, _mm256_castsi256_ps(FirstOf8(n - 8)))};
}
int FirstEqual(F a, F b) {
  const unsigned mask =
      static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ))) |
      static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ))) << 8;
  return mask ? __builtin_ctz(mask) : -1;
}
float ReduceMax(F v) {
  const __m256 m8 = _mm256_max_ps(v.lo, v.hi);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
float ReduceAdd(F v) {
  const __m256 s8 = _mm256_add_ps(v.lo, v.hi);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
F LoadHalf(const uint16_t* p) {
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
void StoreHalf(uint16_t* p, F v) {
  __m128i* to = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(to, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(to + 1, _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
uint16_t ToHalf(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
float FromHalf(uint16_t v) { return _cvtsh_ss(v); }

I ToInt(F v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
F ToFloat(I v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
I Add(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
int32_t ReduceAdd(I v) {
  const __m256i s8 = _mm256_add_epi32(v.lo, v.hi);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
void StoreInt8(int8_t* p, I v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// Sixteen pairs of bf16, which is the upper half of fp32: the first of each, and the second.
void LoadPairs(const uint8_t* p, F* first, F* second) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  const __m256i lo = _mm256_load_si256(from), hi = _mm256_load_si256(from + 1);
  *first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  const __m256i upper = _mm256_set1_epi32(-0x10000);
  *second = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)),
             _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}

F LoadField(const uint8_t* p, int shift, int mask) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  const auto field = [&](const __m256i& words) {
    return _mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi32(mask));
  };
  return ToFloat(I{field(_mm256_load_si256(from)), field(_mm256_load_si256(from + 1))});
}
void StoreQuads(uint8_t* p, const F (&v)[4]) {
  const I i[4] = {ToInt(v[0]), ToInt(v[1]), ToInt(v[2]), ToInt(v[3])};
  // Bytes of four outputs lie by input: [4][4] to be turned.
  const __m256i turn = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const auto store = [&](uint8_t* to, __m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_shuffle_epi8(bytes, turn));
  };
  store(p, i[0].lo, i[1].lo, i[2].lo, i[3].lo);
  store(p + 32, i[0].hi, i[1].hi, i[2].hi, i[3].hi);
}

F LoadInt8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return ToFloat(I{_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}
// 64 nibbles from the low halves, 64 from the high ones.
void OpenNibbles(const uint8_t* from, uint8_t* low, uint8_t* high) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int at = 0; at < 64; at += 32) {
    const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at));
    _mm256_store_si256(reinterpret_cast<__m256i*>(low + at), _mm256_and_si256(both, mask));
    _mm256_store_si256(reinterpret_cast<__m256i*>(high + at),
                       _mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
  }
}
W LoadWeights(const uint8_t* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  return {_mm256_load_si256(from), _mm256_load_si256(from + 1)};
}
