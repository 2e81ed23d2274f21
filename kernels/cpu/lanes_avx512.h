// Sixteen lanes in one AVX-512 register. Included by kernels_avx512.cc inside its own namespace.
#pragma once

using F = __m512;   // 16 fp32
using I = __m512i;  // 16 int32
using Sum = I;
using W = __m512i;  // 16 outputs by 4 weights, offset by 128 (VNNI multiplies u8 by s8)
using X = __m512i;  // 4 activations, sixteen times

// 4 rows by 4 registers of outputs: 16 sums, 4 weights and 1 activation of 32 registers, and more
// independent sums than two FMA ports times four cycles of latency need.
constexpr int kRows = 4;
constexpr int kVecs = 4;
// Steps of the int8 loop to write out: all. In a loop GCC 12 copies every sum of VPDPBUSD twice.
constexpr int kDotUnroll = 16;

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
uint16_t ToHalf(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
float FromHalf(uint16_t v) { return _cvtsh_ss(v); }

I ToInt(F v) { return _mm512_cvtps_epi32(v); }
F ToFloat(I v) { return _mm512_cvtepi32_ps(v); }
I Add(I a, I b) { return _mm512_add_epi32(a, b); }
int32_t ReduceAdd(I v) { return _mm512_reduce_add_epi32(v); }
void StoreInt8(int8_t* p, I v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
}
F LoadInt8(const int8_t* p) {
  return ToFloat(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// The sum starts where the weights' offset is cancelled: sum (w + 128) a - 128 sum a.
Sum StartSum(int32_t offset) { return _mm512_set1_epi32(offset); }
W LoadWeights(const uint8_t* p) { return _mm512_load_si512(p); }
X LoadActivations(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
Sum Dot4(Sum sum, W w, X x) { return _mm512_dpbusd_epi32(sum, w, x); }

// Transposes 16 rows of 16 dwords at rows[r] + offset into dst[i * dst_stride]. The move of
// 128-bit pieces to their lanes is done by loads that insert, which may run beside the shuffles
// (one port) of the transposition within lanes.
template <bool kWeights>
void Transpose16(const uint8_t* const* rows, int64_t offset, uint8_t* dst, int64_t dst_stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 4
  for (int piece = 0; piece < 4; ++piece) {
    __m512i a[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto part = [&](int lane) {
        return _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(rows[4 * lane + j] + offset + 16 * piece));
      };
      a[j] = _mm512_castsi128_si512(part(0));
      a[j] = _mm512_inserti32x4(a[j], part(1), 1);
      a[j] = _mm512_inserti32x4(a[j], part(2), 2);
      a[j] = _mm512_inserti32x4(a[j], part(3), 3);
      if (kWeights) a[j] = _mm512_xor_si512(a[j], flip);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(a[0], a[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(a[2], a[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(a[2], a[3]);
    uint8_t* to = dst + 4 * piece * dst_stride;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_store_si512(to + dst_stride, _mm512_unpackhi_epi64(low01, low23));
    _mm512_store_si512(to + 2 * dst_stride, _mm512_unpacklo_epi64(high01, high23));
    _mm512_store_si512(to + 3 * dst_stride, _mm512_unpackhi_epi64(high01, high23));
  }
}

// Puts 4 rows of 64 weights side by side: 64 outputs by 4. The bytes stay in their 128-bit lanes,
// so outputs come out in the order that RestoreOrder undoes once per result.
void Interleave4(const uint8_t* const* rows, int64_t offset, uint8_t* dst) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const auto row = [&](int r) {
    return _mm512_xor_si512(_mm512_loadu_si512(rows[r] + offset), flip);
  };
  const __m512i r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
  _mm512_store_si512(dst, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(dst + 64, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(dst + 128, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(dst + 192, _mm512_unpackhi_epi16(high01, high23));
}

// Lane l of register v holds outputs 16 l + 4 v ..: a 4x4 transposition of 128-bit lanes.
void RestoreOrder(float* sums) {
  const F v0 = Load(sums), v1 = Load(sums + 16), v2 = Load(sums + 32), v3 = Load(sums + 48);
  const F a = _mm512_shuffle_f32x4(v0, v1, 0x44), b = _mm512_shuffle_f32x4(v2, v3, 0x44);
  const F c = _mm512_shuffle_f32x4(v0, v1, 0xee), d = _mm512_shuffle_f32x4(v2, v3, 0xee);
  Store(sums, _mm512_shuffle_f32x4(a, b, 0x88));
  Store(sums + 16, _mm512_shuffle_f32x4(a, b, 0xdd));
  Store(sums + 32, _mm512_shuffle_f32x4(c, d, 0x88));
  Store(sums + 48, _mm512_shuffle_f32x4(c, d, 0xdd));
}
