// A product of some rows with some strips of a weight. Included once by each kernels_*.cc, after
// its lanes and tiles.
//
// A sum's order is fixed by its depth alone: a group of integers is summed exactly, then added to
// an fp32 sum by two fused multiply-adds, group after group; fp32 goes value by value. How many
// rows and strips pass together, how tasks are split and which worker runs them changes no bit.
#pragma once

int Least(int a, int b) { return a < b ? a : b; }

F LoadUpTo(const float* p, int n) { return n >= 16 ? Load(p) : n > 0 ? LoadFirst(p, n) : Set1(0); }

void QuantizeRow(const float* x, int depth, int8_t* values, float* scales, float* sums,
                 int32_t* counts) {
  constexpr int kVectors = kGroup / 16;
  for (int base = 0, group = 0; base < depth; base += kGroup, ++group) {
    F v[kVectors];
    F most = Set1(0), fault = Set1(0);  // fault stays 0 unless a value is infinite or NaN
    for (int i = 0; i < kVectors; ++i) {
      const int n = depth - base - 16 * i;
      v[i] = LoadUpTo(x + base + 16 * i, n);
      most = Max(most, Abs(v[i]));
      fault = fault + (v[i] - v[i]);
    }
    const float max = ReduceMax(most);
    const float bad = ReduceAdd(fault);
    if (bad != 0) {  // no integer stands for these
      for (F& each : v) each = Set1(0);
    }
    const F inverse = Set1(max > kTinyGroup ? 127.0f / max : 0.0f);
    I sum = ToInt(Set1(0));
    for (int i = 0; i < kVectors; ++i) {
      const I rounded = ToInt(v[i] * inverse);
      sum = Add(sum, rounded);
      StoreInt8(values + base + 16 * i, rounded);
    }
    counts[group] = ReduceAdd(sum);
    scales[group] = max / 127.0f + bad;
    sums[group] = scales[group] * static_cast<float>(counts[group]);
  }
}

// c[r][v] += sum_k a[r][k] * b[k][v] for R rows, V registers wide, k ascending; b's registers lie
// b_step apart, c's 16. The sums live in registers only if every loop over them is written out,
// hence the pragmas.
template <int R, int V>
void FmaBlock(const float* a, int64_t a_stride, int depth, const float* b, int64_t b_stride,
              int64_t b_step, float* c, int64_t c_stride) {
  F sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Load(c + r * c_stride + 16 * v);
  }
  for (int k = 0; k < depth; ++k) {
    F w[V];
    for (int v = 0; v < V; ++v) w[v] = Load(b + k * b_stride + v * b_step);
    for (int r = 0; r < R; ++r) {
      const F x = Set1(a[r * a_stride + k]);
      for (int v = 0; v < V; ++v) sum[r][v] = Fma(x, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Store(c + r * c_stride + 16 * v, sum[r][v]);
  }
}

// Adds the products of R rows with `groups` groups of V strips to their fp32 sums. `blocks` are
// the groups' values, kTaskStrips a group; `scales` and `minimums` are [groups, kTaskOutputs].
template <int R, int V, bool kNibbles>
void DotChunk(const QuantizedRows& q, int first, int groups, const uint8_t* const* blocks,
              const float* scales, const float* minimums, float* sums) {
  const int8_t* x = q.values + static_cast<int64_t>(first) * kGroup;
  F acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = Load(sums + r * kTaskOutputs + 16 * v);
  }
  for (int g = 0; g < groups; ++g, x += kGroup) {
    const int32_t* counts = q.counts + first + g;
    const uint8_t* w_at[V];
    for (int v = 0; v < V; ++v) w_at[v] = blocks[g * kTaskStrips + v];
    Sum sum[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sum[r][v] = StartSum<kNibbles>(counts[r * q.groups]);
    }
#pragma GCC unroll kDotUnroll
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      W w[V];
      for (int v = 0; v < V; ++v) w[v] = LoadWeights(w_at[v] + 4 * kStripOutputs * quad);
      for (int r = 0; r < R; ++r) {
        const X four = LoadActivations(x + r * q.stride + 4 * quad);
        for (int v = 0; v < V; ++v) sum[r][v] = Dot4<kNibbles>(sum[r][v], w[v], four);
      }
    }
    for (int r = 0; r < R; ++r) {
      const F scale = Set1(q.scales[r * q.groups + first + g]);
      const F total = Set1(q.sums[r * q.groups + first + g]);
      for (int v = 0; v < V; ++v) {
        const F exact = FinishSum<kNibbles>(sum[r][v]) * scale;
        acc[r][v] = Fma(exact, Load(scales + g * kTaskOutputs + 16 * v), acc[r][v]);
        acc[r][v] = Fma(total, Load(minimums + g * kTaskOutputs + 16 * v), acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) Store(sums + r * kTaskOutputs + 16 * v, acc[r][v]);
  }
}

// The blocks to be multiplied next, fetched a few lines at a time while others are multiplied: all
// at once they would wait for each other, and a short run is nothing that the hardware foresees.
struct Ahead {
  const uint8_t* strip = nullptr;  // where its blocks to come begin
  int64_t strip_bytes = 0;
  int64_t bytes = 0;  // to come of each strip
  int strips = 0;
  int lines = 0;   // for each pass of rows
  int64_t at = 0;  // in this strip

  void Fetch() {
    for (int i = 0; i < lines && strips > 0; ++i) {
      __builtin_prefetch(strip + at);
      at += 64;
      if (at < bytes) continue;
      at = 0;
      strip += strip_bytes;
      --strips;
    }
  }
};

// After groups [first, first + groups): the strips' next chunk, or the first of the next task's.
Ahead AfterChunk(const MatMulTask& t, int first, int groups, int strips) {
  const int64_t block = BlockBytes(t.bits);
  const int next = first + groups;
  const bool within = next < t.groups;
  const int at = within ? next : 0;
  const int64_t bytes = Least(kChunkGroups, within ? t.groups - next : t.groups) * block;
  const int passes = (t.rows + kDotRows - 1) / kDotRows * ((strips + kDotStrips - 1) / kDotStrips);
  constexpr int kFewPasses = 2;  // they read as fast as memory gives, and the hardware follows
  if (passes < kFewPasses || (!within && t.next_strips == nullptr)) return {.strips = 0};
  return {.strip = (within ? t.strips : t.next_strips) + at * block,
          .strip_bytes = within ? t.strip_bytes : t.next_strip_bytes,
          .bytes = bytes,
          .strips = strips,
          .lines = static_cast<int>((strips * bytes / 64 + passes - 1) / passes)};
}

template <int V, bool kNibbles>
void DotRows(const MatMulTask& t, int first, int groups, int strip, Ahead* ahead,
             MatMulScratch* s) {
  QuantizedRows q = t.q;
  const auto at = [&](int row) {
    q.values = t.q.values + row * q.stride;
    q.scales = t.q.scales + static_cast<int64_t>(row) * q.groups;
    q.sums = t.q.sums + static_cast<int64_t>(row) * q.groups;
    q.counts = t.q.counts + static_cast<int64_t>(row) * q.groups;
    return s->sums + static_cast<int64_t>(row) * kTaskOutputs + 16 * strip;
  };
  const uint8_t* const* blocks = s->blocks + strip;
  const float* scales = s->scales + 16 * strip;
  const float* minimums = s->minimums + 16 * strip;
  int r = DotTiles<V>(t, first, groups, strip, s, [&] { ahead->Fetch(); });
  for (; r + kDotRows <= t.rows; r += kDotRows) {
    float* sums = at(r);
    ahead->Fetch();
    DotChunk<kDotRows, V, kNibbles>(q, first, groups, blocks, scales, minimums, sums);
  }
  if (kDotRows > 2 && r + 2 <= t.rows) {
    float* sums = at(r);
    ahead->Fetch();
    DotChunk<2, V, kNibbles>(q, first, groups, blocks, scales, minimums, sums);
    r += 2;
  }
  if (r < t.rows) {
    float* sums = at(r);
    ahead->Fetch();
    DotChunk<1, V, kNibbles>(q, first, groups, blocks, scales, minimums, sums);
  }
}

// Makes the blocks of groups [first, first + groups) ready: scales widened, values as bytes.
template <bool kNibbles>
void OpenChunk(const MatMulTask& t, int first, int groups, int strips, MatMulScratch* s) {
  constexpr int64_t kBytes = BlockBytes(kNibbles ? 4 : 8);
  for (int g = 0; g < groups; ++g) {
    for (int v = 0; v < strips; ++v) {
      const uint8_t* block = t.strips + v * t.strip_bytes + (first + g) * kBytes;
      const uint16_t* header = reinterpret_cast<const uint16_t*>(block);
      Store(s->scales + g * kTaskOutputs + 16 * v, LoadHalf(header));
      Store(s->minimums + g * kTaskOutputs + 16 * v, LoadHalf(header + kStripOutputs));
      const int at = g * kTaskStrips + v;
      if (!kNibbles && kBytesInPlace) {
        s->blocks[at] = block + kBlockHeader;
        continue;
      }
      uint8_t* to = s->values + at * kStripOutputs * kGroup;
      constexpr int kLine = 4 * kStripOutputs;  // a quad of each output
      for (int i = 0; i < (kNibbles ? 4 : 8); ++i) {
        if (kNibbles) {
          OpenNibbles(block + kBlockHeader + i * kLine, to + i * kLine, to + (i + 4) * kLine);
        } else {
          OpenBytes(block + kBlockHeader + i * kLine, to + i * kLine);
        }
      }
      s->blocks[at] = to;
    }
  }
}

template <bool kNibbles>
void DotTask(const MatMulTask& t, int strips, MatMulScratch* s) {
  for (int first = 0; first < t.groups; first += kChunkGroups) {
    const int groups = Least(kChunkGroups, t.groups - first);
    OpenChunk<kNibbles>(t, first, groups, strips, s);
    Ahead ahead = AfterChunk(t, first, groups, strips);
    int strip = 0;
    for (; strip + kDotStrips <= strips; strip += kDotStrips) {
      DotRows<kDotStrips, kNibbles>(t, first, groups, strip, &ahead, s);
    }
    if (kDotStrips > 2 && strip + 2 <= strips) {
      DotRows<2, kNibbles>(t, first, groups, strip, &ahead, s);
      strip += 2;
    }
    for (; strip < strips; ++strip) DotRows<1, kNibbles>(t, first, groups, strip, &ahead, s);
  }
}

void WidenBf16(const uint8_t* from, float* to) {
  for (int pair = 0; pair < kGroup / 2; ++pair) {
    F low, high;
    LoadPairs(from + 4 * kStripOutputs * pair, &low, &high);
    Store(to + 2 * kStripOutputs * pair, low);
    Store(to + 2 * kStripOutputs * pair + kStripOutputs, high);
  }
}

// The same for floats, a group at a time. fp32 blocks are read in place, bf16 ones widened first.
template <int V>
void FmaStrips(const MatMulTask& t, int g, int strip, MatMulScratch* s) {
  const int depth = Least(kGroup, t.depth - g * kGroup);
  const float* x = t.x + static_cast<int64_t>(g) * kGroup;
  const uint8_t* from = t.strips + strip * t.strip_bytes + g * BlockBytes(t.bits);
  const float* block = reinterpret_cast<const float*>(from);
  int64_t step = t.strip_bytes / static_cast<int64_t>(sizeof(float));
  if (t.bits == 16) {
    for (int v = 0; v < V; ++v) WidenBf16(from + v * t.strip_bytes, s->widened[v]);
    block = s->widened[0];
    step = kStripOutputs * kGroup;
  }
  float* sums = s->sums + 16 * strip;
  int r = 0;
  for (; r + kFmaRows <= t.rows; r += kFmaRows) {
    FmaBlock<kFmaRows, V>(x + r * t.x_stride, t.x_stride, depth, block, kStripOutputs, step,
                          sums + r * kTaskOutputs, kTaskOutputs);
  }
  for (; r < t.rows; ++r) {
    FmaBlock<1, V>(x + r * t.x_stride, t.x_stride, depth, block, kStripOutputs, step,
                   sums + r * kTaskOutputs, kTaskOutputs);
  }
}

void FmaTask(const MatMulTask& t, int strips, MatMulScratch* s) {
  for (int g = 0; g < t.groups; ++g) {
    int strip = 0;
    for (; strip + kVecs <= strips; strip += kVecs) FmaStrips<kVecs>(t, g, strip, s);
    if (kVecs > 1) {
      for (; strip < strips; ++strip) FmaStrips<1>(t, g, strip, s);
    }
  }
}

void MatMul(const MatMulTask& t, MatMulScratch* s) {
  const int strips = (t.outputs + kStripOutputs - 1) / kStripOutputs;
  for (int r = 0; r < t.rows; ++r) {
    for (int v = 0; v < strips; ++v) Store(s->sums + r * kTaskOutputs + 16 * v, Set1(0));
  }
  if (t.bits > 8) {
    FmaTask(t, strips, s);
  } else if (t.bits == 8) {
    DotTask<false>(t, strips, s);
  } else {
    DotTask<true>(t, strips, s);
  }
  for (int r = 0; r < t.rows; ++r) {
    const float* from = s->sums + r * kTaskOutputs;
    float* to = t.out + r * t.out_stride;
    for (int n = 0; n < t.outputs; n += 16) {
      const int width = Least(16, t.outputs - n);
      F v = Load(from + n);
      if (t.bias != nullptr) v = v + LoadFirst(t.bias + n, width);
      if (t.add) v = LoadFirst(to + n, width) + v;
      StoreFirst(to + n, v, width);
    }
  }
}
