// Attention of some queries over the pages of their sequence, and the writing of those pages.
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
void SeeTokens(const AttentionTask& t, int first, int visible, const float* keys,
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

// Bytes: where the tokens' scales end and the values begin.
constexpr int64_t kScalesBytes = kPage * sizeof(float);

void WidenKeys(const AttentionTask& t, const uint8_t* page, float* to) {
  if (t.bits == 16) {
    const uint16_t* k = reinterpret_cast<const uint16_t*>(page);
    for (int d = 0; d < t.head_dim; ++d) Store(to + d * kPage, LoadHalf(k + d * kPage));
    return;
  }
  const F scales = Load(reinterpret_cast<const float*>(page));
  for (int d = 0; d < t.head_dim; ++d) {
    const uint8_t* quad = page + kScalesBytes + d / 4 * 4 * kPage;
    Store(to + d * kPage, LoadByteOfEach(quad, d % 4) * scales);
  }
}

// `n` <= 16 values of a token, from the d-th on.
F LoadValues(const AttentionTask& t, const uint8_t* page, int token, int d, int n) {
  const int64_t at = static_cast<int64_t>(token) * t.head_dim + d;
  if (t.bits == 32) return LoadFirst(reinterpret_cast<const float*>(page) + at, n);
  float few[16] = {};
  if (t.bits == 16) {
    const uint16_t* v = reinterpret_cast<const uint16_t*>(page) + at;
    if (n == 16) return LoadHalf(v);
    for (int i = 0; i < n; ++i) few[i] = FromHalf(v[i]);
    return Load(few);
  }
  const F scale = Set1(reinterpret_cast<const float*>(page)[token]);
  const int8_t* v = reinterpret_cast<const int8_t*>(page + kScalesBytes) + at;
  if (n == 16) return LoadInt8(v) * scale;
  for (int i = 0; i < n; ++i) few[i] = v[i];
  return Load(few) * scale;
}

// Pages lie anywhere, in runs too short for the hardware to foresee: fetched while the one before
// is seen.
void FetchPage(const AttentionTask& t, int page, int kv_head) {
  const uint8_t* base = t.pool + t.pages[page] * t.page_bytes;
  const uint8_t* keys = base + kv_head * t.head_bytes;
  const uint8_t* values = base + (t.kv_heads + kv_head) * t.head_bytes;
  for (int64_t at = 0; at < t.head_bytes; at += 64) __builtin_prefetch(keys + at);
  for (int64_t at = 0; at < t.head_bytes; at += 64) __builtin_prefetch(values + at);
}

WidePage Widen(const AttentionTask& t, int page, int kv_head, int tokens) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  const uint8_t* base = t.pool + t.pages[page] * t.page_bytes;
  const uint8_t* keys = base + kv_head * t.head_bytes;
  const uint8_t* values = base + (t.kv_heads + kv_head) * t.head_bytes;
  WidePage wide = {reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values)};
  if (t.bits != 32) {
    WidenKeys(t, keys, t.scratch);
    wide.keys = t.scratch;
  }
  if (t.bits == 32 && padded == t.head_dim) return wide;
  float* to = t.scratch + kPage * padded;
  wide.values = to;
  for (int token = 0; token < tokens; ++token, to += padded) {
    for (int d = 0; d < padded; d += 16) {
      Store(to + d, LoadValues(t, values, token, d, Least(16, t.head_dim - d)));
    }
  }
  return wide;
}

// Lets queries [q, end), which share their KV head, see what they may of a page.
void SeePage(const AttentionTask& t, int q, int end, int page, int pages) {
  const int kv_head = t.queries[q].kv_head;
  const auto visible = [&](int query) {
    return Least(kPage, t.queries[query].position + 1 - page * kPage);
  };
  while (q < end && visible(q) <= 0) ++q;
  if (q == end) return;
  if (page + 1 < pages) FetchPage(t, page + 1, kv_head);
  const WidePage wide = Widen(t, page, kv_head, visible(end - 1));
  while (q < end) {
    const int tokens = visible(q);
    int run = 1;
    while (run < kFmaRows && q + run < end && visible(q + run) == tokens) ++run;
    switch (run) {
      case 1:
        SeeTokens<1>(t, q, tokens, wide.keys, wide.values);
        break;
      case 2:
        SeeTokens<2>(t, q, tokens, wide.keys, wide.values);
        break;
      case 3:
        SeeTokens<3>(t, q, tokens, wide.keys, wide.values);
        break;
      default:
        SeeTokens<kFmaRows>(t, q, tokens, wide.keys, wide.values);
    }
    q += run;
  }
}

void Attention(const AttentionTask& t) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  for (int i = 0; i < t.count; ++i) {
    const QueryState state = StateOf(t, i);
    for (int64_t d = 0; d < padded; d += 16) Store(state.out + d, Set1(0));
    Store(state.sum, Set1(0));
    *state.max = -__FLT_MAX__;
  }
  const int pages = t.queries[t.count - 1].position / kPage + 1;
  for (int page = 0; page < pages; ++page) {
    for (int q = 0; q < t.count;) {
      int end = q + 1;
      while (end < t.count && t.queries[end].kv_head == t.queries[q].kv_head) ++end;
      SeePage(t, q, end, page, pages);
      q = end;
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

// Calls put(d, value) with a token's values as int8, and returns their scale. It is not finite if a
// value is not, so the fault is seen in what attends to it.
template <typename Put>
float QuantizeToken(const float* x, int dim, const Put& put) {
  F most = Set1(0), fault = Set1(0);
  for (int d = 0; d < dim; d += 16) {
    const F v = LoadUpTo(x + d, dim - d);
    most = Max(most, Abs(v));
    fault = fault + (v - v);
  }
  const float max = ReduceMax(most);
  const float bad = ReduceAdd(fault);
  const F inverse = Set1(max > kTinyGroup ? 127.0f / max : 0.0f);
  for (int d = 0; d < dim; d += 16) {
    int8_t values[16];
    StoreInt8(values, ToInt(bad == 0 ? LoadUpTo(x + d, dim - d) * inverse : Set1(0)));
    for (int i = 0; i < Least(16, dim - d); ++i) put(d + i, values[i]);
  }
  return max / 127.0f + bad;
}

void StoreKv(const StoreTask& t) {
  const int64_t row = static_cast<int64_t>(t.slot) * t.head_dim;
  if (t.bits == 8) {
    int8_t* keys = reinterpret_cast<int8_t*>(t.key_page + kScalesBytes) + 4 * t.slot;
    int8_t* values = reinterpret_cast<int8_t*>(t.value_page + kScalesBytes) + row;
    reinterpret_cast<float*>(t.key_page)[t.slot] = QuantizeToken(
        t.key, t.head_dim, [&](int d, int8_t v) { keys[d / 4 * 4 * kPage + d % 4] = v; });
    reinterpret_cast<float*>(t.value_page)[t.slot] =
        QuantizeToken(t.value, t.head_dim, [&](int d, int8_t v) { values[d] = v; });
    return;
  }
  if (t.bits == 16) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(t.key_page) + t.slot;
    uint16_t* values = reinterpret_cast<uint16_t*>(t.value_page) + row;
    for (int d = 0; d < t.head_dim; ++d) keys[d * kPage] = ToBoundedHalf(t.key[d]);
    for (int d = 0; d < t.head_dim; ++d) values[d] = ToBoundedHalf(t.value[d]);
    return;
  }
  float* keys = reinterpret_cast<float*>(t.key_page) + t.slot;
  float* values = reinterpret_cast<float*>(t.value_page) + row;
  for (int d = 0; d < t.head_dim; ++d) keys[d * kPage] = t.key[d];
  for (int d = 0; d < t.head_dim; ++d) values[d] = t.value[d];
}
