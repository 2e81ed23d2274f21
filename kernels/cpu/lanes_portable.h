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

constexpr int kFmaRows = 2;  // rows of a product in fp32, by kVecs registers
constexpr int kVecs = 1;
constexpr int kDotRows = 2;  // rows of a product of integers, by kDotStrips strips
constexpr int kDotStrips = 1;
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

F LoadHalf(const uint16_t* p) {
  return Each([&](int i) {
    return Float4{FromHalf(p[4 * i]), FromHalf(p[4 * i + 1]), FromHalf(p[4 * i + 2]),
                  FromHalf(p[4 * i + 3])};
  });
}

void StoreHalf(uint16_t* p, const F& v) {
  for (int i = 0; i < 16; ++i) p[i] = ToHalf(v.part[i / 4][i % 4]);
}

// Sixteen pairs of bf16, which is the upper half of fp32: the first of each, and the second.
void LoadPairs(const uint8_t* p, F* first, F* second) {
  I pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  *first = Each([&](int i) { return (Float4)(pairs.part[i] << 16); });
  *second = Each([&](int i) { return (Float4)(pairs.part[i] & -0x10000); });
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

// Of each of 16 words of 32 bits those of `mask` from `shift` on, as a number.
F LoadField(const uint8_t* p, int shift, int mask) {
  I words;
  __builtin_memcpy(&words, p, sizeof words);
  return Each(
      [&](int i) { return __builtin_convertvector(words.part[i] >> shift & mask, Float4); });
}
// p[4 * lane + i] = v[i] of the lane, to nearest even, within 0 to 255. |v| < 2^22.
void StoreQuads(uint8_t* p, const F (&v)[4]) {
  for (int i = 0; i < 4; ++i) {
    const I bytes = ToInt(Min(Max(v[i], Set1(0)), Set1(255)));
    for (int lane = 0; lane < 16; ++lane) {
      p[4 * lane + i] = static_cast<uint8_t>(bytes.part[lane / 4][lane % 4]);
    }
  }
}

F LoadInt8(const int8_t* p) {
  return Each([&](int i) {
    return __builtin_convertvector(Int4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]},
                                   Float4);
  });
}
// What bytes and nibbles must be before they are multiplied: here, nothing but apart.
constexpr bool kBytesInPlace = true;
void OpenBytes(const uint8_t*, uint8_t*) {}
void OpenNibbles(const uint8_t* from, uint8_t* low, uint8_t* high) {
  for (int i = 0; i < 64; ++i) {
    low[i] = from[i] & 15;
    high[i] = from[i] >> 4;
  }
}
// `count`: sum of the group's activations, for who offsets the weights.
template <bool kNibbles>
Sum StartSum(int32_t /*count*/) {
  return Set1(0);
}
// A sum that was made elsewhere.
[[maybe_unused]] Sum LoadSum(const int32_t* p) {
  I sums;
  __builtin_memcpy(&sums, p, sizeof sums);
  return Each([&](int i) { return __builtin_convertvector(sums.part[i], Float4); });
}
W LoadWeights(const uint8_t* p) {
  I packed;
  __builtin_memcpy(&packed, p, sizeof packed);
  W w;
  for (int j = 0; j < 4; ++j) {
    w.plane[j] = Each(
        [&](int i) { return __builtin_convertvector(packed.part[i] >> (8 * j) & 255, Float4); });
  }
  return w;
}
// Signed bytes.
W LoadSigned(const uint8_t* p) {
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
Sum StartSigned(int32_t) { return Set1(0); }
X LoadActivations(const int8_t* p) {
  return {static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
          static_cast<float>(p[3])};
}
template <bool kNibbles>
Sum Dot4(Sum sum, const W& w, const X& x) {
  for (int j = 0; j < 4; ++j) sum = sum + w.plane[j] * Set1(x.value[j]);
  return sum;
}
template <bool kNibbles>
F FinishSum(const Sum& sum) {
  return sum;
}
