// e^x on sixteen lanes. Included once by each kernels_*.cc, after its lanes.
#pragma once

// Relative error below 1.2e-7 for x in [-87.3, 88.3]; x beyond is taken as that bound; NaN stays.
// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r = 1 + r + r^2 p(r) with the
// minimax p of degree 4 (relative error 3e-9, found by a Remez exchange). ln 2 is split so that n
// times its upper part is exact even without a fused multiply.
F Exp(F x) {
  x = Max(Set1(-87.3f), Min(Set1(88.3f), x));
  const F n = Round(x * Set1(0x1.715476p+0f));
  F r = Fma(n, Set1(-0x1.62e4p-1f), x);
  r = Fma(n, Set1(-0x1.7f7d1cp-20f), r);
  F p = Set1(0x1.6a241ap-10f);
  p = Fma(p, r, Set1(0x1.1239f2p-7f));
  p = Fma(p, r, Set1(0x1.5558f2p-5f));
  p = Fma(p, r, Set1(0x1.555492p-3f));
  p = Fma(p, r, Set1(0x1.fffffcp-2f));
  p = Fma(p, r, Set1(1));
  p = Fma(p, r, Set1(1));
  return TimesPowerOf2(p, n);
}
