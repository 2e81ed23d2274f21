// Ops on one row: norm, rotation, activation, statistics of logits. Included once
// by each kernels_*.cc, after body_matmul.h and body_exp.h.
#pragma once

void Rotate(float* x, int heads, int head_dim, bool interleaved, const float* cosines,
            const float* sines) {
  for (int h = 0; h < heads; ++h, x += head_dim) {
    if (interleaved) {
      for (int d = 0; d < head_dim; d += 2) {
        const float a = x[d], b = x[d + 1];
        x[d] = a * cosines[d] + b * sines[d];
        x[d + 1] = b * cosines[d + 1] + a * sines[d + 1];
      }
    } else {
      const int half = head_dim / 2;
      for (int d = 0; d < half; ++d) {
        const float a = x[d], b = x[d + half];
        x[d] = a * cosines[d] + b * sines[d];
        x[d + half] = b * cosines[d + half] + a * sines[d + half];
      }
    }
  }
}

void RmsNormRow(const float* x, const float* weight, float eps, int cols, float* out) {
  F squares[4] = {Set1(0), Set1(0), Set1(0), Set1(0)};
  int i = 0;
  for (; i + 64 <= cols; i += 64) {
    for (int j = 0; j < 4; ++j) {
      const F v = Load(x + i + 16 * j);
      squares[j] = Fma(v, v, squares[j]);
    }
  }
  for (; i < cols; i += 16) {
    const F v = LoadFirst(x + i, Least(16, cols - i));
    squares[0] = Fma(v, v, squares[0]);
  }
  const float sum = ReduceAdd((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const F scale = Set1(1.0f / __builtin_sqrtf(sum / static_cast<float>(cols) + eps));
  for (i = 0; i < cols; i += 16) {
    const int n = Least(16, cols - i);
    StoreFirst(out + i, LoadFirst(x + i, n) * scale * LoadFirst(weight + i, n), n);
  }
}

void SwiGlu(const float* gate, const float* up, int count, float* out) {
  for (int i = 0; i < count; i += 16) {
    const int n = Least(16, count - i);
    const F g = LoadFirst(gate + i, n);
    StoreFirst(out + i, g / (Set1(1) + Exp(Set1(0) - g)) * LoadFirst(up + i, n), n);
  }
}

LogitPartial LogitBlock(const float* logits, int count) {
  const F lowest = Set1(-__builtin_inff());
  F most = lowest;
  for (int i = 0; i < count; i += 16) {
    const int n = Least(16, count - i);
    most = Max(KeepFirst(LoadFirst(logits + i, n), n, lowest), most);
  }
  LogitPartial out = {ReduceMax(most), 0, 0};
  // In a block of nothing but -inf any base will do: what it adds is weighed with e^-inf.
  const F base = Set1(out.max > -__builtin_inff() ? out.max : 0);
  F sum = Set1(0);
  int found = -1;
  for (int i = 0; i < count; i += 16) {
    const int n = Least(16, count - i);
    const F v = KeepFirst(LoadFirst(logits + i, n), n, lowest);
    const int lane = found < 0 ? FirstEqual(v, Set1(out.max)) : -1;
    if (lane >= 0) found = i + lane;
    sum = sum + KeepFirst(Exp(v - base), n, Set1(0));
  }
  out.argmax = found < 0 || found >= count ? 0 : found;
  out.sum = ReduceAdd(sum);
  return out;
}
