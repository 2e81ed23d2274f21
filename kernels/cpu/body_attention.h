// Attention of some queries over the pages of one KV head, and the writing of those pages.
// Included once by each kernels_*.cc, after body_matmul.h and body_exp.h.
//
// A query meets its pages in order and each page does to it what it would do were it alone, so
// neither the other queries nor the chunk that brought it change a bit.
#pragma once

constexpr int kPage = 16;  // tokens of a page: the lanes of one register of scores

// What a query has seen so far. sum[lane] holds the lane's share of the softmax denominator.
struct QueryState {
  float* out;     // [PaddedHeadDim]
  float* sum;     // [16]
  float* weight;  // [16]: of the page at hand
  float* max;     // [1]
};

QueryState StateOf(const AttentionTask& t, int i) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  float* base = t.scratch + 2 * kPage * padded + i * (padded + 3 * kPage);
  return {base, base + padded, base + padded + kPage, base + padded + 2 * kPage};
}

// scores[r][token] = q[r] . k[.][token] for R queries. Even and odd dimensions are summed apart, so
// that one query alone has two chains of additions in flight.
template <int R>
void Scores(const AttentionTask& t, int first, const float* keys, F* scores) {
  F even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = Set1(0);
  for (int d = 0; d < t.head_dim; d += 2) {
    const F k0 = Load(keys + d * kPage), k1 = Load(keys + (d + 1) * kPage);
    for (int r = 0; r < R; ++r) {
      const float* q = t.queries[first + r].q + d;
      even[r] = Fma(Set1(q[0]), k0, even[r]);
      odd[r] = Fma(Set1(q[1]), k1, odd[r]);
    }
  }
  for (int r = 0; r < R; ++r) scores[r] = (even[r] + odd[r]) * Set1(t.scale);
}

// Lets R neighbouring queries see the first `visible` tokens of a page.
template <int R>
void SeePage(const AttentionTask& t, int first, int visible, const float* keys,
             const float* values) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  F scores[R];
  Scores<R>(t, first, keys, scores);
  for (int r = 0; r < R; ++r) {
    const QueryState state = StateOf(t, first + r);
    const F seen = KeepFirst(scores[r], visible, Set1(-__FLT_MAX__));
    const float max = ReduceMax(seen);
    F sum = Load(state.sum);
    if (max > *state.max) {
      const F shrink = Exp(Set1(*state.max - max));
      sum = sum * shrink;
      for (int64_t d = 0; d < padded; d += 16) Store(state.out + d, Load(state.out + d) * shrink);
      *state.max = max;
    }
    const F weight = KeepFirst(Exp(seen - Set1(*state.max)), visible, Set1(0));
    Store(state.sum, sum + weight);
    Store(state.weight, weight);
  }
  const QueryState state = StateOf(t, first);
  const int64_t stride = padded + 3 * kPage;
  FmaRows<R>(state.weight, stride, visible, values, padded, static_cast<int>(padded), state.out,
             stride);
}

// One page's keys as fp32 [head_dim][16] and values as fp32 [16][PaddedHeadDim]: in place if they
// are that already, else widened into scratch.
struct WidePage {
  const float* keys;
  const float* values;
};

WidePage Widen(const AttentionTask& t, int page, int tokens) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  const int64_t head_values = static_cast<int64_t>(t.head_dim) * kPage;
  const int64_t size = t.half ? sizeof(uint16_t) : sizeof(float);
  const uint8_t* base = t.pool + t.pages[page] * t.page_bytes;
  const uint8_t* keys = base + t.kv_head * head_values * size;
  const uint8_t* values = base + (t.kv_heads + t.kv_head) * head_values * size;
  float* wide_keys = t.scratch;
  float* wide_values = t.scratch + kPage * padded;
  if (t.half) {
    const uint16_t* k = reinterpret_cast<const uint16_t*>(keys);
    for (int64_t i = 0; i < head_values; i += 16) Store(wide_keys + i, LoadHalf(k + i));
  } else {
    wide_keys = const_cast<float*>(reinterpret_cast<const float*>(keys));
  }
  if (!t.half && padded == t.head_dim) {
    return {wide_keys, reinterpret_cast<const float*>(values)};
  }
  for (int token = 0; token < tokens; ++token) {
    float* to = wide_values + token * padded;
    int d = 0;
    if (t.half) {
      const uint16_t* v = reinterpret_cast<const uint16_t*>(values) + token * t.head_dim;
      for (; d + 16 <= t.head_dim; d += 16) Store(to + d, LoadHalf(v + d));
      for (; d < t.head_dim; ++d) to[d] = FromHalf(v[d]);
    } else {
      const float* v = reinterpret_cast<const float*>(values) + token * t.head_dim;
      for (; d + 16 <= t.head_dim; d += 16) Store(to + d, Load(v + d));
      for (; d < t.head_dim; ++d) to[d] = v[d];
    }
    for (; d < padded; ++d) to[d] = 0;
  }
  return {wide_keys, wide_values};
}

void Attention(const AttentionTask& t) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  for (int i = 0; i < t.count; ++i) {
    const QueryState state = StateOf(t, i);
    for (int64_t d = 0; d < padded; d += 16) Store(state.out + d, Set1(0));
    Store(state.sum, Set1(0));
    *state.max = -__FLT_MAX__;
  }
  const int last = t.queries[t.count - 1].position;
  int i = 0;  // the first query that sees the page
  for (int page = 0; page * kPage <= last; ++page) {
    const auto visible = [&](int query) {
      return Least(kPage, t.queries[query].position + 1 - page * kPage);
    };
    while (visible(i) <= 0) ++i;
    const WidePage wide = Widen(t, page, visible(t.count - 1));
    for (int q = i; q < t.count;) {
      const int tokens = visible(q);
      int run = 1;
      while (run < kFmaRows && q + run < t.count && visible(q + run) == tokens) ++run;
      switch (run) {
        case 1:
          SeePage<1>(t, q, tokens, wide.keys, wide.values);
          break;
        case 2:
          SeePage<2>(t, q, tokens, wide.keys, wide.values);
          break;
        case 3:
          SeePage<3>(t, q, tokens, wide.keys, wide.values);
          break;
        default:
          SeePage<kFmaRows>(t, q, tokens, wide.keys, wide.values);
      }
      q += run;
    }
  }
  for (int q = 0; q < t.count; ++q) {
    const QueryState state = StateOf(t, q);
    const F sum = Set1(ReduceAdd(Load(state.sum)));
    for (int d = 0; d < t.head_dim; d += 16) {
      StoreFirst(t.queries[q].out + d, Load(state.out + d) / sum, Least(16, t.head_dim - d));
    }
  }
}

// The largest finite fp16 stands for what is larger: an infinity would make every later score NaN.
uint16_t ToBoundedHalf(float v) {
  constexpr float kMost = 65504;
  return ToHalf(v > kMost ? kMost : v < -kMost ? -kMost : v);
}

void StoreKv(const StoreTask& t) {
  if (t.half) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(t.key_page) + t.slot;
    uint16_t* values = reinterpret_cast<uint16_t*>(t.value_page) + t.slot * t.head_dim;
    for (int d = 0; d < t.head_dim; ++d) keys[d * kPage] = ToBoundedHalf(t.key[d]);
    for (int d = 0; d < t.head_dim; ++d) values[d] = ToBoundedHalf(t.value[d]);
    return;
  }
  float* keys = reinterpret_cast<float*>(t.key_page) + t.slot;
  float* values = reinterpret_cast<float*>(t.value_page) + t.slot * t.head_dim;
  for (int d = 0; d < t.head_dim; ++d) keys[d * kPage] = t.key[d];
  for (int d = 0; d < t.head_dim; ++d) values[d] = t.value[d];
}
