// fp16 to and from fp32 in integer arithmetic, by the bits of F16C. Included inside a namespace of
// the including file's own, as lanes are: see kernel_table.h.
#pragma once

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
// Rounds to nearest even.
[[maybe_unused]] uint16_t ToHalf(float v) {
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
