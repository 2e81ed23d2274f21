// K and V in four bits: what makes them spread evenly, their rounding, and their way back to bytes.
// Included once by each kernels_*.cc, before body_attention.h.
//
// A page of int4 holds two halves of kPage tokens. K or V of a head in it: fp16 scales [2][kPage],
// then for each half
//   K  [head_dim / 8][kPage][4]: byte j holds dimension 8 i + j in its low bits, 8 i + 4 + j above;
//   V  [kPage][head_dim / 2]: of each 32 dimensions (fewer at the end) the first half in low bits.
// A byte is of one token, so rows of a step may be stored side by side. The number n in 0 .. 15
// stands for (2 n - 15) * scale.
#pragma once

constexpr int kPage = 16;  // tokens of an int8 page: the lanes of one register of scores
// Bytes: where the tokens' scales end and the values begin, of int8 and int4 alike.
constexpr int64_t kScalesBytes = kPage * sizeof(float);

struct Extent {
  float max;    // of |x|
  float fault;  // 0; not finite if an x is not
};

Extent ExtentOf(const float* x, int dim) {
  F most = Set1(0), fault = Set1(0);
  for (int d = 0; d < dim; d += 16) {
    const F v = LoadUpTo(x + d, dim - d);
    most = Max(most, Abs(v));
    fault = fault + (v - v);
  }
  return {ReduceMax(most), ReduceAdd(fault)};
}

typedef float Vector16 __attribute__((vector_size(64)));

// One step of the transform inside a register: lanes kStep apart become their sum and difference.
template <int kStep>
void Butterfly(Vector16* x) {
#define ESPALIER_LANE(i) ((i) ^ kStep)
#define ESPALIER_SIGN(i) ((i) & kStep ? -1.0f : 1.0f)
#define ESPALIER_16(of)                                                                         \
  of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), \
      of(13), of(14), of(15)
  const Vector16 partner = __builtin_shufflevector(*x, *x, ESPALIER_16(ESPALIER_LANE));
  const Vector16 signs = {ESPALIER_16(ESPALIER_SIGN)};
  *x = *x * signs + partner;
#undef ESPALIER_16
#undef ESPALIER_SIGN
#undef ESPALIER_LANE
}

// Multiplies runs of x by the orthonormal Hadamard matrix of the largest power of two that divides
// `dim`, a multiple of 8. It is its own inverse and leaves products of two vectors as they are, and
// an outlier becomes a little of everything, which is what four bits can tell (QuaRot,
// arXiv 2404.00456).
void Spread(float* x, int dim) {
  const int run = dim & -dim;
  if (run == 8) {
    for (int at = 0; at < dim; at += 8) {
      Vector16 v = {};
      __builtin_memcpy(&v, x + at, 8 * sizeof(float));
      Butterfly<1>(&v);
      Butterfly<2>(&v);
      Butterfly<4>(&v);
      v *= 0.35355339059327376f;  // 8^-1/2
      __builtin_memcpy(x + at, &v, 8 * sizeof(float));
    }
    return;
  }
  const float norm = 1 / __builtin_sqrtf(static_cast<float>(run));
  for (int at = 0; at < dim; at += 16) {
    Vector16 v;
    __builtin_memcpy(&v, x + at, sizeof v);
    Butterfly<1>(&v);
    Butterfly<2>(&v);
    Butterfly<4>(&v);
    Butterfly<8>(&v);
    v *= norm;
    __builtin_memcpy(x + at, &v, sizeof v);
  }
  for (int step = 16; step < run; step *= 2) {
    for (int at = 0; at < dim; at += 2 * step) {
      for (int i = at; i < at + step; i += 16) {
        const F a = Load(x + i), b = Load(x + i + step);
        Store(x + i, a + b);
        Store(x + i + step, a - b);
      }
    }
  }
}

// Rounds x, which has been spread, to n[0 .. dim) of the scale that reaches the largest value: of
// 64 normal ones it lies near where cutting off would begin to pay, and a search for a better scale
// gained nothing. dim is a multiple of 8, and n has room for a multiple of 16. The scale, in fp16,
// is not finite if a value is not.
uint16_t RoundToInt4(const float* x, int dim, int8_t* n) {
  const auto [max, bad] = ExtentOf(x, dim);
  constexpr float kMost = 15 * 65504.0f;  // of which the scale still is a number in fp16
  uint16_t halves[16];
  StoreHalf(halves, Set1((max < kMost ? max : kMost) / 15 + bad));
  float scales[16];
  Store(scales, LoadHalf(halves));
  const float inverse = bad == 0 && scales[0] > 0 ? 0.5f / scales[0] : 0;
  for (int d = 0; d < dim; d += 16) {
    const F v = inverse == 0 ? Set1(0) : LoadUpTo(x + d, dim - d);
    StoreInt8(n + d, ToInt(Max(Set1(0), Min(Set1(15), Fma(v, Set1(inverse), Set1(7.5f))))));
  }
  return halves[0];
}

// n[0 .. count) in low bits, as many behind them in high bits; a multiple of four.
void PackInt4(const int8_t* n, int count, uint8_t* to) {
  for (int i = 0; i < count; i += 4) {
    uint32_t low, high;
    __builtin_memcpy(&low, n + i, sizeof low);
    __builtin_memcpy(&high, n + count + i, sizeof high);
    low |= high << 4;  // none is above 15
    __builtin_memcpy(to + i, &low, sizeof low);
  }
}

// Puts a token's K (less what all keys share, which no softmax sees) or V into its slot,
// [0, 2 kPage), of a head's int4 page. `x` is overwritten.
void StoreInt4(float* x, int dim, bool key, int slot, uint8_t* page) {
  Spread(x, dim);
  int8_t n[PaddedHeadDim(kMostInt4HeadDim)];
  reinterpret_cast<uint16_t*>(page)[slot] = RoundToInt4(x, dim, n);
  uint8_t* half = page + kScalesBytes + int64_t{slot / kPage} * (kPage * dim / 2);
  slot %= kPage;
  if (key) {
    for (int d = 0; d < dim; d += 8) PackInt4(n + d, 4, half + (d / 8 * kPage + slot) * 4);
    return;
  }
  uint8_t* to = half + int64_t{slot} * dim / 2;
  for (int d = 0; d < dim; d += 32) PackInt4(n + d, Least(32, dim - d) / 2, to + d / 2);
}

// kCount bytes as what the numbers in their low and high bits stand for.
template <int kCount>
void OpenInt4(const uint8_t* from, int8_t* low, int8_t* high) {
  typedef uint8_t Bytes __attribute__((vector_size(kCount)));
  Bytes v;
  __builtin_memcpy(&v, from, kCount);
  Bytes n = v & 15;
  n = n + n - 15;  // modulo 256, which is two's complement
  __builtin_memcpy(low, &n, kCount);
  n = v >> 4;
  n = n + n - 15;
  __builtin_memcpy(high, &n, kCount);
}

// Half of a head's int4 page as the int8 page that it stands for, of spread values.
void OpenHalfPage(const uint8_t* page, int half, int dim, bool keys, uint8_t* to) {
  Store(reinterpret_cast<float*>(to),
        LoadHalf(reinterpret_cast<const uint16_t*>(page) + half * kPage));
  const uint8_t* from = page + kScalesBytes + int64_t{half} * (kPage * dim / 2);
  int8_t* values = reinterpret_cast<int8_t*>(to + kScalesBytes);
  if (keys) {
    for (int d = 0; d < dim; d += 8, from += 4 * kPage, values += 8 * kPage) {
      OpenInt4<4 * kPage>(from, values, values + 4 * kPage);
    }
    return;
  }
  for (int token = 0; token < kPage; ++token) {
    for (int d = 0; d < dim; d += 32) {
      const int low = Least(32, dim - d) / 2;
      if (low == 16) {
        OpenInt4<16>(from, values, values + 16);
      } else {
        for (int j = 0; j < low; j += 4) OpenInt4<4>(from + j, values + j, values + low + j);
      }
      from += low;
      values += 2 * low;
    }
  }
}

// Makes K or V of a head's int4 page of two int8 ones, the second of which may be missing.
void PackKv(const PackKvTask& t) {
  const int tokens = t.from[1] == nullptr ? kPage : 2 * kPage;
  // All is read before anything is written: `to` may be one of `from`.
  for (int token = 0; token < tokens; ++token) {
    const uint8_t* page = t.from[token / kPage];
    const int slot = token % kPage;
    const float scale = reinterpret_cast<const float*>(page)[slot];
    const int8_t* values = reinterpret_cast<const int8_t*>(page + kScalesBytes);
    float* x = t.scratch + int64_t{token} * t.head_dim;
    for (int d = 0; d < t.head_dim; ++d) {
      const int at = t.keys ? (d / 4 * kPage + slot) * 4 + d % 4 : slot * t.head_dim + d;
      x[d] = scale * static_cast<float>(values[at]) - (t.mean == nullptr ? 0 : t.mean[d]);
    }
  }
  for (int token = 0; token < tokens; ++token) {
    StoreInt4(t.scratch + int64_t{token} * t.head_dim, t.head_dim, t.keys, token, t.to);
  }
}
