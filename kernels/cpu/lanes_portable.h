// Sixteen lanes in plain C++, as four vectors of the four that every machine has. Included by
// kernels_portable.cc inside its own namespace; says what the other lane files must mean.
#pragma once

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct F {  // 16 fp32
  Float4 part[4];
};
struct I {  // 16 int32
  Int4 part[4];
};
// Products of int8 are summed in fp32 here, which is exact: a group's sum stays below 2^24. (SSE2
// has no 32-bit multiply.)
using Sum = F;
struct W {  // 16 outputs by 4 weights: plane[j] holds the j-th weight of each output
  F plane[4];
};
struct X {  // 4 activations
  float value[4];
};

constexpr int kRows = 2;
constexpr int kVecs = 1;
constexpr int kDotUnroll = 1;

template <typename Fn>
F Each(const Fn& fn) {
  return {fn(0), fn(1), fn(2), fn(3)};
}

F operator+(const F& a, const F& b) {
  return Each([&](int i) { return a.part[i] + b.part[i]; });
}
F operator-(const F& a, const F& b) {
  return Each([&](int i) { return a.part[i] - b.part[i]; });
}
F operator*(const F& a, const F& b) {
  return Each([&](int i) { return a.part[i] * b.part[i]; });
}
F operator/(const F& a, const F& b) {
  return Each([&](int i) { return a.part[i] / b.part[i]; });
}

F Load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
F LoadFirst(const float* p, int n) {
  F v = {};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}
void Store(float* p, const F& v) { __builtin_memcpy(p, &v, sizeof v); }
void StoreFirst(float* p, const F& v, int n) { __builtin_memcpy(p, &v, n * sizeof(float)); }
F Set1(float v) {
  return Each([&](int) { return Float4{v, v, v, v}; });
}
// Two roundings: a fused one in software would cost a call for each lane.
F Fma(const F& a, const F& b, const F& c) { return a * b + c; }
// Of a and b, b if either is NaN.
F Max(const F& a, const F& b) {
  return Each([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}
F Min(const F& a, const F& b) {
  return Each([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}
F Abs(const F& v) {
  return Each([&](int i) { return (Float4)((Int4)v.part[i] & 0x7fffffff); });
}
// For |v| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction, so the sum is rounded to nearest
// even, and its low bits are the whole number in two's complement.
constexpr float kRounder = 12582912.0f;
F Round(const F& v) { return v + Set1(kRounder) - Set1(kRounder); }
// n whole, in [-126, 127].
F TimesPowerOf2(const F& v, const F& n) {
  return v * Each([&](int i) {
           return (Float4)((__builtin_convertvector(n.part[i], Int4) + 127) << 23);
         });
}
F KeepFirst(const F& v, int n, const F& other) {
  return Each([&](int i) {
    return Int4{4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3} < n ? v.part[i] : other.part[i];
  });
}
int FirstEqual(const F& a, const F& b) {
  for (int i = 0; i < 16; ++i) {
    if (a.part[i / 4][i % 4] == b.part[i / 4][i % 4]) return i;
  }
  return -1;
}
float ReduceMax(const F& v) {
  float max = v.part[0][0];
  for (int i = 1; i < 16; ++i) max = v.part[i / 4][i % 4] > max ? v.part[i / 4][i % 4] : max;
  return max;
}
float ReduceAdd(const F& v) {
  const Float4 s = (v.part[0] + v.part[1]) + (v.part[2] + v.part[3]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

float FromBits(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
uint32_t ToBits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  return bits;
}
float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return FromBits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The product by 2^112 moves the exponent's bias and makes subnormals normal, exactly.
  const float magnitude = FromBits(rest << 13) * 0x1p112f;
  return FromBits(sign | ToBits(magnitude));
}
// Rounds to nearest even, as F16C does.
uint16_t ToHalf(float v) {
  const uint32_t sign = ToBits(v) >> 16 & 0x8000;
  const uint32_t bits = ToBits(v) & 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
  if (bits < 0x38800000) {  // subnormal: the unit of 2^-24 is the last bit of a number near 0.5
    return static_cast<uint16_t>(sign | (ToBits(FromBits(bits) + 0.5f) - 0x3f000000));
  }
  const uint32_t even = bits >> 13 & 1;
  return static_cast<uint16_t>(sign | ((bits + 0xfff + even - 0x38000000) >> 13));
}
F LoadHalf(const uint16_t* p) {
  return Each([&](int i) {
    return Float4{FromHalf(p[4 * i]), FromHalf(p[4 * i + 1]), FromHalf(p[4 * i + 2]),
                  FromHalf(p[4 * i + 3])};
  });
}

// |v| < 2^22.
I ToInt(const F& v) {
  I out;
  for (int i = 0; i < 4; ++i) out.part[i] = (Int4)(v.part[i] + kRounder) - 0x4b400000;
  return out;
}
I Add(const I& a, const I& b) {
  I out;
  for (int i = 0; i < 4; ++i) out.part[i] = a.part[i] + b.part[i];
  return out;
}
int32_t ReduceAdd(const I& v) {
  typedef uint32_t Unsigned4 __attribute__((vector_size(16)));
  const Unsigned4 s =
      (Unsigned4)v.part[0] + (Unsigned4)v.part[1] + (Unsigned4)v.part[2] + (Unsigned4)v.part[3];
  return static_cast<int32_t>(s[0] + s[1] + s[2] + s[3]);
}
void StoreInt8(int8_t* p, const I& v) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(v.part[i / 4][i % 4]);
}
F LoadInt8(const int8_t* p) {
  return Each([&](int i) {
    return __builtin_convertvector(Int4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]},
                                   Float4);
  });
}

Sum StartSum(int32_t) { return Set1(0); }
F ToFloat(const Sum& v) { return v; }
W LoadWeights(const uint8_t* p) {
  I packed;
  __builtin_memcpy(&packed, p, sizeof packed);
  W w;
  for (int j = 0; j < 4; ++j) {
    w.plane[j] = Each([&](int i) {
      return __builtin_convertvector(packed.part[i] << (24 - 8 * j) >> 24, Float4);
    });
  }
  return w;
}
X LoadActivations(const int8_t* p) {
  return {static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
          static_cast<float>(p[3])};
}
Sum Dot4(Sum sum, const W& w, const X& x) {
  for (int j = 0; j < 4; ++j) sum = sum + w.plane[j] * Set1(x.value[j]);
  return sum;
}

// Transposes 16 rows of 16 dwords at rows[r] + offset into dst[i * dst_stride].
template <bool kWeights>
void Transpose16(const uint8_t* const* rows, int64_t offset, uint8_t* dst, int64_t dst_stride) {
  for (int r = 0; r < 16; ++r) {
    for (int i = 0; i < 16; ++i) {
      __builtin_memcpy(dst + i * dst_stride + 4 * r, rows[r] + offset + 4 * i, 4);
    }
  }
}

// Puts 4 rows of 64 weights side by side: 64 outputs by 4. An instruction set may leave the
// outputs in another order, if its RestoreOrder puts a tile's row of sums right.
void Interleave4(const uint8_t* const* rows, int64_t offset, uint8_t* dst) {
  for (int i = 0; i < 64; ++i) {
    for (int r = 0; r < 4; ++r) dst[4 * i + r] = rows[r][offset + i];
  }
}

void RestoreOrder(float*) {}
