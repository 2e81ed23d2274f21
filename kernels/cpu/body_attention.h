// Attention of some queries over the pages of their sequence, and the writing of those pages.
// Included once by each kernels_*.cc, after body_matmul.h, body_exp.h
// and body_kv4.h.
//
// A query meets its pages in blocks of kBlockPages, which lie at multiples of that, and a block
// does to it what it would do were it alone, so neither the other queries nor the chunk that
// brought it change a bit. A key behind what a query sees has weight zero in it.
#pragma once

constexpr int kBlockTokens = kBlockPages * kPage;

// What a query has seen so far, and what it needs of the block at hand.
struct QueryState {
  float* out;      // [PaddedHeadDim]
  float* sum;      // [16]: each lane's share of the softmax denominator
  float* weights;  // [kBlockTokens]: scores of the block, then what its values weigh
  int8_t* high;    // [PaddedHeadDim]: of the query as scale * (128 * high + low), for int8 keys
  int8_t* low;     // [PaddedHeadDim]
  float* max;
  float* shrink;  // what the block does to `out` and `sum` so far
  float* scale;   // of high and low
  int32_t* high_sum;
  int32_t* low_sum;
};

QueryState StateOf(const AttentionTask& t, int i) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  float* base = t.scratch + 2 * kBlockTokens * padded + i * QueryStateFloats(t.head_dim);
  float* sum = base + padded;
  float* weights = sum + 16;
  float* rest = weights + kBlockTokens;
  int8_t* high = reinterpret_cast<int8_t*>(rest + 16);
  int32_t* sums = reinterpret_cast<int32_t*>(rest + 3);
  return {base, sum, weights, high, high + padded, rest, rest + 1, rest + 2, sums, sums + 1};
}

// Pages lie anywhere, in runs too short for the hardware to foresee, and fetched all at once they
// would wait for each other: those of the next block come a few lines at a time.
struct PagesAhead {
  const uint8_t* pieces[2 * kBlockPages];
  int count = 0;
  int64_t bytes = 0;  // of each
  int piece = 0;
  int64_t at = 0;

  void Fetch(int lines) {
    for (; lines > 0 && piece < count; --lines) {
      __builtin_prefetch(pieces[piece] + at);
      at += 64;
      if (at < bytes) continue;
      at = 0;
      ++piece;
    }
  }
};
constexpr int kLinesAhead = 16;   // fetched at a time
constexpr int kStepsBetween = 8;  // dimensions or tokens between two such times

// kBlockPages pages of one KV head. Behind the last page that any query sees, that page again:
// nothing of it is used, and no lane is read from where nothing is.
struct Block {
  const uint8_t* keys[kBlockPages];
  const uint8_t* values[kBlockPages];
  const uint8_t* value_scales[kBlockPages];  // int8: of tokens, [16] fp32
  int first_token = 0;
  int pages = 0;      // that are seen
  int key_bits = 32;  // where the pointers are: widened ones have 32
  int value_bits = 32;
  int value_stride = 0;  // values from a token to the next
  PagesAhead ahead;
};

// How many of a block's tokens a query sees.
int Visible(const AttentionTask& t, int query, int first_token) {
  return Least(kBlockTokens, t.queries[query].position + 1 - first_token);
}

template <int kBits>
F LoadKeys(const uint8_t* page, int d) {
  if (kBits == 16) return LoadHalf(reinterpret_cast<const uint16_t*>(page) + d * kPage);
  return Load(reinterpret_cast<const float*>(page) + d * kPage);
}

template <int kBits>
F LoadValues(const uint8_t* page, int64_t at) {
  if (kBits == 8) return LoadInt8(reinterpret_cast<const int8_t*>(page) + at);
  if (kBits == 16) return LoadHalf(reinterpret_cast<const uint16_t*>(page) + at);
  return Load(reinterpret_cast<const float*>(page) + at);
}

// `n` values, if fewer than sixteen; zeros behind them.
F LoadSomeValues(int bits, const uint8_t* page, int64_t at, int n) {
  if (n >= 16) {
    return bits == 8    ? LoadValues<8>(page, at)
           : bits == 16 ? LoadValues<16>(page, at)
                        : LoadValues<32>(page, at);
  }
  float few[16] = {};
  for (int i = 0; i < n; ++i) {
    few[i] = bits == 8    ? reinterpret_cast<const int8_t*>(page)[at + i]
             : bits == 16 ? FromHalf(reinterpret_cast<const uint16_t*>(page)[at + i])
                          : reinterpret_cast<const float*>(page)[at + i];
  }
  return Load(few);
}

// weights[r][token] = q[r] . k[.][token] * scale for R queries and P pages. A dimension is a step
// of every sum, in order, whatever R and P.
template <int R, int P, int kBits>
void Scores(const AttentionTask& t, int first, int page, Block* block) {
  F sum[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sum[r][p] = Set1(0);
  }
  const float* q[R];
  for (int r = 0; r < R; ++r) q[r] = t.queries[first + r].q;
  for (int from = 0; from < t.head_dim; from += kStepsBetween) {
    block->ahead.Fetch(kLinesAhead);
    const int to = Least(t.head_dim, from + kStepsBetween);
    for (int d = from; d < to; ++d) {
      F k[P];
      for (int p = 0; p < P; ++p) k[p] = LoadKeys<kBits>(block->keys[page + p], d);
      for (int r = 0; r < R; ++r) {
        const F x = Set1(q[r][d]);
        for (int p = 0; p < P; ++p) sum[r][p] = Fma(x, k[p], sum[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float* weights = StateOf(t, first + r).weights + page * kPage;
    for (int p = 0; p < P; ++p) Store(weights + p * kPage, sum[r][p] * Set1(t.scale));
  }
}

// The same for int8 keys: two exact products of bytes stand for one with 15 bits of the query.
template <int R, int P>
void ByteScores(const AttentionTask& t, int first, int page, Block* block) {
  Sum high[R][P], low[R][P];
  QueryState state[R];
  for (int r = 0; r < R; ++r) {
    state[r] = StateOf(t, first + r);
    for (int p = 0; p < P; ++p) {
      high[r][p] = StartSigned(*state[r].high_sum);
      low[r][p] = StartSigned(*state[r].low_sum);
    }
  }
  const auto add_quad = [&](int d) {
    W k[P];
    for (int p = 0; p < P; ++p) k[p] = LoadSigned(block->keys[page + p] + kScalesBytes + d * kPage);
    for (int r = 0; r < R; ++r) {
      const X h = LoadActivations(state[r].high + d), l = LoadActivations(state[r].low + d);
      for (int p = 0; p < P; ++p) {
        high[r][p] = Dot4<false>(high[r][p], k[p], h);
        low[r][p] = Dot4<false>(low[r][p], k[p], l);
      }
    }
  };
  int d = 0;
  for (; d + 4 * kStepsBetween <= t.head_dim; d += 4 * kStepsBetween) {
    block->ahead.Fetch(kLinesAhead);
#pragma GCC unroll kDotUnroll
    for (int quad = 0; quad < kStepsBetween; ++quad) add_quad(d + 4 * quad);
  }
  for (; d < t.head_dim; d += 4) add_quad(d);
  for (int r = 0; r < R; ++r) {
    const F scale = Set1(*state[r].scale * t.scale);
    for (int p = 0; p < P; ++p) {
      const F exact = Fma(FinishSum<false>(high[r][p]), Set1(128), FinishSum<false>(low[r][p]));
      const F scales = Load(reinterpret_cast<const float*>(block->keys[page + p]));
      Store(state[r].weights + (page + p) * kPage, exact * (scales * scale));
    }
  }
}

// Pages that pass together: as many as registers hold, or half of them. Integers, which have two
// sums of each, take half.
template <int R>
void ScoreBlock(const AttentionTask& t, int first, Block* block) {
  constexpr int kMany = kVecs, kFew = kVecs > 1 ? kVecs / 2 : 1;
  for (int page = 0; page < block->pages;) {
    if (block->key_bits == 8) {
      if constexpr (R <= kDotRows) ByteScores<R, kFew>(t, first, page, block);
      page += kFew;
    } else if (block->pages - page <= kFew) {
      block->key_bits == 16 ? Scores<R, kFew, 16>(t, first, page, block)
                            : Scores<R, kFew, 32>(t, first, page, block);
      page += kFew;
    } else {
      block->key_bits == 16 ? Scores<R, kMany, 16>(t, first, page, block)
                            : Scores<R, kMany, 32>(t, first, page, block);
      page += kMany;
    }
  }
}

// Makes weights of a query's scores for the block's first `visible` tokens, and zeros of the
// others. The first P pages hold all that any query sees.
template <int P>
void Soften(const QueryState& state, int visible, const Block& block) {
  const auto in_page = [&](int p) {
    return Least(kPage, visible > p * kPage ? visible - p * kPage : 0);
  };
  F seen[P];
  F most = Set1(-__FLT_MAX__);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    seen[p] = KeepFirst(Load(state.weights + p * kPage), in_page(p), Set1(-__FLT_MAX__));
    most = Max(seen[p], most);
  }
  const float before = *state.max, here = ReduceMax(most);
  const float max = here > before ? here : before;
  const F shrink = Exp(Set1(before - max));
  F sum = Load(state.sum) * shrink;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const int n = in_page(p);
    F weight = KeepFirst(Exp(seen[p] - Set1(max)), n, Set1(0));
    sum = sum + weight;
    if (block.value_scales[p] != nullptr) {
      const F scales = Load(reinterpret_cast<const float*>(block.value_scales[p]));
      weight = KeepFirst(weight * scales, n, Set1(0));
    }
    Store(state.weights + p * kPage, weight);
  }
  Store(state.sum, sum);
  *state.max = max;
  StoreFirst(state.shrink, shrink, 1);
}

// out[r][v] = out[r][v] * shrink[r] + weights[r] . values for R queries and V registers of values.
// A weight of zero does not excuse a query from an infinity behind what it sees, so the tokens that
// the first of them, who sees least, does not see are added one by one to those who do.
template <int R, int V, int kBits>
void AddValues(const AttentionTask& t, int first, int d, Block* block) {
  F sum[R][V];
  const float* weights[R];
  int seen[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const QueryState state = StateOf(t, first + r);
    seen[r] = Visible(t, first + r, block->first_token);
    const F shrink = Set1(*state.shrink);
    weights[r] = state.weights;
    for (int v = 0; v < V; ++v) sum[r][v] = Load(state.out + d + 16 * v) * shrink;
  }
  const auto load = [&](int token, F(&x)[V]) {
    const uint8_t* values = block->values[token / kPage];
    const int64_t at = static_cast<int64_t>(token % kPage) * block->value_stride + d;
    for (int v = 0; v < V; ++v) x[v] = LoadValues<kBits>(values, at + 16 * v);
  };
  for (int from = 0; from < seen[0]; from += kStepsBetween) {
    block->ahead.Fetch(kLinesAhead);
    const int to = Least(seen[0], from + kStepsBetween);
    for (int token = from; token < to; ++token) {
      F x[V];
      load(token, x);
      for (int r = 0; r < R; ++r) {
        const F weight = Set1(weights[r][token]);
        for (int v = 0; v < V; ++v) sum[r][v] = Fma(weight, x[v], sum[r][v]);
      }
    }
  }
  for (int token = seen[0]; token < seen[R - 1]; ++token) {
    F x[V];
    load(token, x);
#pragma GCC unroll 4
    for (int r = 1; r < R; ++r) {
      if (token >= seen[r]) continue;
      const F weight = Set1(weights[r][token]);
      for (int v = 0; v < V; ++v) sum[r][v] = Fma(weight, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float* out = StateOf(t, first + r).out + d;
    for (int v = 0; v < V; ++v) Store(out + 16 * v, sum[r][v]);
  }
}

template <int R, int V>
void AddSomeValues(const AttentionTask& t, int first, int d, Block* block) {
  switch (block->value_bits) {
    case 8:
      return AddValues<R, V, 8>(t, first, d, block);
    case 16:
      return AddValues<R, V, 16>(t, first, d, block);
    default:
      return AddValues<R, V, 32>(t, first, d, block);
  }
}

template <int R>
void AddBlock(const AttentionTask& t, int first, Block* block) {
  const int padded = static_cast<int>(PaddedHeadDim(t.head_dim));
  int d = 0;
  for (; d + 16 * kVecs <= padded; d += 16 * kVecs) {
    AddSomeValues<R, kVecs>(t, first, d, block);
  }
  if (kVecs > 1) {
    for (; d < padded; d += 16) AddSomeValues<R, 1>(t, first, d, block);
  }
}

// A query's 15 bits for int8 keys: 128 * high + low = round(16256 * q / max|q|).
void SplitQuery(const float* q, int dim, const QueryState& state) {
  const auto [max, bad] = ExtentOf(q, dim);
  const F inverse = Set1(max > kTinyGroup ? 16256.0f / max : 0.0f);
  I highs = ToInt(Set1(0)), lows = highs;
  for (int d = 0; d < dim; d += 16) {
    const F v = bad == 0 ? Round(LoadUpTo(q + d, dim - d) * inverse) : Set1(0);
    const F high = Round(v * Set1(1.0f / 128));
    const F low = v - high * Set1(128);
    StoreInt8(state.high + d, ToInt(high));
    StoreInt8(state.low + d, ToInt(low));
    highs = Add(highs, ToInt(high));
    lows = Add(lows, ToInt(low));
  }
  *state.high_sum = ReduceAdd(highs);
  *state.low_sum = ReduceAdd(lows);
  *state.scale = max / 16256.0f + bad;
}

// Queries that share a page's KV head, above which fp16 keys and values are widened once for all of
// them instead of in registers for some.
constexpr int kFewQueries = kFmaRows;

void WidenBlock(const AttentionTask& t, int tokens, Block* block) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  float* wide_keys = t.scratch;
  float* wide_values = t.scratch + kBlockTokens * padded;
  for (int p = 0; p < kBlockPages; ++p) {
    if (p >= block->pages) {
      block->keys[p] = block->keys[block->pages - 1];
      continue;
    }
    if (t.bits == 16) {
      float* to = wide_keys + p * kPage * padded;
      for (int d = 0; d < t.head_dim; ++d) {
        if (d % kStepsBetween == 0) block->ahead.Fetch(kLinesAhead);
        Store(to + d * kPage, LoadKeys<16>(block->keys[p], d));
      }
      block->keys[p] = reinterpret_cast<const uint8_t*>(to);
    }
    float* to = wide_values + p * kPage * padded;
    const int here = Least(kPage, tokens - p * kPage);
    for (int token = 0; token < here; ++token) {
      if (token % kStepsBetween == 0) block->ahead.Fetch(kLinesAhead);
      for (int d = 0; d < padded; d += 16) {
        Store(to + token * padded + d,
              LoadSomeValues(block->value_bits, block->values[p], int64_t{token} * t.head_dim + d,
                             t.head_dim - d));
      }
    }
    block->values[p] = reinterpret_cast<const uint8_t*>(to);
  }
  if (t.bits == 16) block->key_bits = 32;
  block->value_bits = 32;
  block->value_stride = static_cast<int>(padded);
}

// Where a block of one KV head begins.
struct BlockPlace {
  int page;
  int kv_head;
};

const uint8_t* KeysAt(const AttentionTask& t, int page, int kv_head) {
  return t.pool + t.pages[page] * t.page_bytes + kv_head * t.head_bytes;
}

PagesAhead LinesOf(const AttentionTask& t, BlockPlace place, int pages) {
  PagesAhead ahead;
  ahead.bytes = t.head_bytes;
  const int halves = t.bits == 4 ? 2 : 1;
  const int end = (Least(pages, place.page + kBlockPages) + halves - 1) / halves;
  for (int page = place.page / halves; page < end; ++page) {
    const uint8_t* keys = KeysAt(t, page, place.kv_head);
    ahead.pieces[ahead.count++] = keys;
    ahead.pieces[ahead.count++] = keys + t.kv_heads * t.head_bytes;
  }
  return ahead;
}

// Where pages of int4 become pages of bytes: kBlockPages of K and of V.
uint8_t* OpenedPages(const AttentionTask& t) {
  return reinterpret_cast<uint8_t*>(t.scratch + 2 * kBlockTokens * PaddedHeadDim(t.head_dim) +
                                    kMaxQueries * QueryStateFloats(t.head_dim));
}

// The block of which `tokens` are seen by any query; `next` is what will be seen after it.
Block OpenBlock(const AttentionTask& t, BlockPlace place, int tokens, BlockPlace next, int pages) {
  Block block;
  block.first_token = place.page * kPage;
  block.pages = (tokens + kPage - 1) / kPage;
  block.key_bits = block.value_bits = t.bits == 4 ? 8 : t.bits;
  block.value_stride = t.head_dim;
  const int64_t scales = block.value_bits == 8 ? kScalesBytes : 0;
  for (int p = 0; p < kBlockPages; ++p) {
    const int seen = Least(p, block.pages - 1), page = place.page + seen;
    const uint8_t* keys = KeysAt(t, t.bits == 4 ? page / 2 : page, place.kv_head);
    const uint8_t* values = keys + t.kv_heads * t.head_bytes;
    if (t.bits == 4) {
      uint8_t* open = OpenedPages(t) + seen * 2 * t.head_bytes;
      if (p == seen) {
        OpenHalfPage(keys, page % 2, t.head_dim, /*keys=*/true, open);
        OpenHalfPage(values, page % 2, t.head_dim, /*keys=*/false, open + t.head_bytes);
      }
      keys = open;
      values = open + t.head_bytes;
    }
    block.keys[p] = keys;
    block.values[p] = values + scales;
    block.value_scales[p] = scales > 0 ? values : nullptr;
  }
  block.ahead = LinesOf(t, next, pages);
  return block;
}

static_assert(kDotRows <= 4 && kFmaRows <= 4);
constexpr void (*kScoreBlock[])(const AttentionTask&, int, Block*) = {ScoreBlock<1>, ScoreBlock<2>,
                                                                      ScoreBlock<3>, ScoreBlock<4>};
constexpr void (*kAddBlock[])(const AttentionTask&, int, Block*) = {AddBlock<1>, AddBlock<2>,
                                                                    AddBlock<3>, AddBlock<4>};

// Lets queries [q, end), which share their KV head, see what they may of a block.
void SeeBlock(const AttentionTask& t, int q, int end, int first_page, BlockPlace next, int pages) {
  const auto visible = [&](int query) { return Visible(t, query, first_page * kPage); };
  while (q < end && visible(q) <= 0) ++q;
  if (q == end) return;
  const int tokens = visible(end - 1);
  Block block = OpenBlock(t, {first_page, t.queries[q].kv_head}, tokens, next, pages);
  const bool ragged = t.head_dim % 16 != 0;
  if (ragged || (t.bits != 32 && end - q > kFewQueries)) WidenBlock(t, tokens, &block);
  const int score_rows = block.key_bits == 8 ? kDotRows : kFmaRows;
  for (int i = q; i < end; i += score_rows) {
    kScoreBlock[Least(score_rows, end - i) - 1](t, i, &block);
  }
  for (int i = q; i < end; ++i) {
    block.pages <= kBlockPages / 2 ? Soften<kBlockPages / 2>(StateOf(t, i), visible(i), block)
                                   : Soften<kBlockPages>(StateOf(t, i), visible(i), block);
  }
  for (int i = q; i < end; i += kFmaRows) {
    kAddBlock[Least(kFmaRows, end - i) - 1](t, i, &block);
  }
}

void Attention(const AttentionTask& t) {
  const int64_t padded = PaddedHeadDim(t.head_dim);
  const int pages = t.queries[t.count - 1].position / kPage + 1;
  const int first_head = t.queries[0].kv_head;
  PagesAhead ahead = LinesOf(t, {0, first_head}, pages);
  for (int i = 0; i < t.count; ++i) {
    ahead.Fetch(kLinesAhead);
    const QueryState state = StateOf(t, i);
    if (t.bits == 8) SplitQuery(t.queries[i].q, t.head_dim, state);
    if (t.bits == 4) {
      __builtin_memcpy(state.out, t.queries[i].q, t.head_dim * sizeof(float));
      Spread(state.out, t.head_dim);
      SplitQuery(state.out, t.head_dim, state);
    }
    for (int64_t d = 0; d < padded; d += 16) Store(state.out + d, Set1(0));
    Store(state.sum, Set1(0));
    *state.max = -__FLT_MAX__;
  }
  for (int page = 0; page < pages; page += kBlockPages) {
    for (int q = 0; q < t.count;) {
      int end = q + 1;
      while (end < t.count && t.queries[end].kv_head == t.queries[q].kv_head) ++end;
      const BlockPlace next = end < t.count ? BlockPlace{page, t.queries[end].kv_head}
                                            : BlockPlace{page + kBlockPages, first_head};
      SeeBlock(t, q, end, page, next, pages);
      q = end;
    }
  }
  for (int q = 0; q < t.count; ++q) {
    const QueryState state = StateOf(t, q);
    const F sum = Set1(ReduceAdd(Load(state.sum)));
    for (int d = 0; d < t.head_dim; d += 16) {
      StoreFirst(t.queries[q].out + d, Load(state.out + d) / sum, Least(16, t.head_dim - d));
    }
    if (t.bits == 4) Spread(t.queries[q].out, t.head_dim);
  }
}

// One row as symmetric int8. The scale is not finite if a value is not, so the fault is seen in
// what attends to it.
struct Quantizer {
  float scale;
  float inverse;  // 0: no integer stands for the values

  Quantizer(const float* x, int dim) {
    const auto [max, bad] = ExtentOf(x, dim);
    scale = max / 127.0f + bad;
    inverse = bad == 0 && max > kTinyGroup ? 127.0f / max : 0.0f;
  }

  void Store(const float* x, int n, int8_t* to) const {
    StoreInt8(to, inverse == 0 ? ToInt(Set1(0)) : ToInt(LoadUpTo(x, n) * Set1(inverse)));
  }
};

// Puts one token where its pages want it, sixteen dimensions at a time. Neighbouring dimensions of
// a key lie kPage tokens apart, or quads of them.
void StoreKv(const StoreTask& t) {
  const int64_t row = static_cast<int64_t>(t.slot) * t.head_dim;
  if (t.bits == 4) {
    alignas(64) float x[PaddedHeadDim(kMostInt4HeadDim)];
    for (int d = 0; d < t.head_dim; ++d) {
      x[d] = t.key[d] - (t.key_mean == nullptr ? 0 : t.key_mean[d]);
    }
    StoreInt4(x, t.head_dim, /*key=*/true, t.slot, t.key_page);
    __builtin_memcpy(x, t.value, t.head_dim * sizeof(float));
    StoreInt4(x, t.head_dim, /*key=*/false, t.slot, t.value_page);
    return;
  }
  if (t.bits == 8) {
    int8_t few[16];
    uint8_t* keys = t.key_page + kScalesBytes + 4 * t.slot;
    uint8_t* values = t.value_page + kScalesBytes + row;
    const Quantizer key(t.key, t.head_dim), value(t.value, t.head_dim);
    for (int d = 0; d < t.head_dim; d += 16) {
      const int n = Least(16, t.head_dim - d);
      key.Store(t.key + d, n, few);
      for (int i = 0; i < n; i += 4) __builtin_memcpy(keys + (d + i) * kPage, few + i, 4);
      value.Store(t.value + d, n, few);
      __builtin_memcpy(values + d, few, n);
    }
    reinterpret_cast<float*>(t.key_page)[t.slot] = key.scale;
    reinterpret_cast<float*>(t.value_page)[t.slot] = value.scale;
    return;
  }
  if (t.bits == 16) {
    // The largest finite fp16 stands for what is larger: an infinity would make every later score
    // NaN.
    const F most = Set1(65504), least = Set1(-65504);
    uint16_t few[16];
    uint16_t* keys = reinterpret_cast<uint16_t*>(t.key_page) + t.slot;
    uint16_t* values = reinterpret_cast<uint16_t*>(t.value_page) + row;
    for (int d = 0; d < t.head_dim; d += 16) {
      const int n = Least(16, t.head_dim - d);
      StoreHalf(few, Max(least, Min(most, LoadUpTo(t.key + d, n))));
      for (int i = 0; i < n; ++i) keys[(d + i) * kPage] = few[i];
      StoreHalf(few, Max(least, Min(most, LoadUpTo(t.value + d, n))));
      __builtin_memcpy(values + d, few, n * sizeof *few);
    }
    return;
  }
  float* keys = reinterpret_cast<float*>(t.key_page) + t.slot;
  float* values = reinterpret_cast<float*>(t.value_page) + row;
  for (int d = 0; d < t.head_dim; ++d) keys[d * kPage] = t.key[d];
  for (int d = 0; d < t.head_dim; ++d) values[d] = t.value[d];
}
