// A tile of a product: pack selected weight rows, then sum. Included once by each kernels_*.cc,
// after its lanes.
//
// A sum's order is fixed by its depth alone: int8 groups are exact integers, each added to an fp32
// sum by one fused multiply-add, in order; fp32 goes value by value. How many rows pass together,
// how tiles are split and which worker runs them changes no bit.
#pragma once

int Least(int a, int b) { return a < b ? a : b; }

F LoadUpTo(const float* p, int n) { return n >= 16 ? Load(p) : n > 0 ? LoadFirst(p, n) : Set1(0); }

int64_t WeightRow(const TileTask& t, int i) {
  return (t.list != nullptr ? t.list[i] : i) * t.row_stride;
}

void QuantizeRow(const float* x, int depth, int8_t* values, float* scales, int32_t* offsets) {
  constexpr int kVectors = kGroup / 16;
  const int end = (depth + kTileDepth - 1) / kTileDepth * kTileDepth;
  for (int base = 0, group = 0; base < end; base += kGroup, ++group) {
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
    scales[group] = max / 127.0f + bad;
    offsets[group] = static_cast<int32_t>(-128u * static_cast<uint32_t>(ReduceAdd(sum)));
  }
}

// c[r][v] += sum_k a[r][k] * b[k][v] for R rows, V registers wide, k ascending. The sums
// live in registers only if every loop over them is written out, hence the pragmas.
template <int R, int V>
void FmaBlock(const float* a, int64_t a_stride, int depth, const float* b, int64_t b_stride,
              float* c, int64_t c_stride) {
  F sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Load(c + r * c_stride + 16 * v);
  }
  for (int k = 0; k < depth; ++k) {
    F w[V];
    for (int v = 0; v < V; ++v) w[v] = Load(b + k * b_stride + 16 * v);
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

// FmaBlock over any width of whole registers.
template <int R>
void FmaRows(const float* a, int64_t a_stride, int depth, const float* b, int64_t b_stride,
             int width, float* c, int64_t c_stride) {
  int n = 0;
  for (; n + 16 * kVecs <= width; n += 16 * kVecs) {
    FmaBlock<R, kVecs>(a, a_stride, depth, b + n, b_stride, c + n, c_stride);
  }
  if (kVecs > 1) {
    for (; n < width; n += 16) {
      FmaBlock<R, 1>(a, a_stride, depth, b + n, b_stride, c + n, c_stride);
    }
  }
}

// Adds one group's products of R rows with its part of a packed int8 tile to their fp32 sums.
template <int R>
void DotRows(const QuantizedRows& q, int group, const uint8_t* tile, const float* weight_scales,
             float* sums) {
  const int64_t stride = static_cast<int64_t>(q.groups) * kGroup;
  const int8_t* x = q.values + static_cast<int64_t>(group) * kGroup;
  for (int n = 0; n < kTileOutputs; n += 16 * kVecs) {
    Sum sum[R][kVecs];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVecs; ++v) sum[r][v] = StartSum(q.offsets[r * q.groups + group]);
    }
#pragma GCC unroll kDotUnroll
    for (int k = 0; k < kGroup; k += 4) {
      W w[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        w[v] = LoadWeights(tile + k * kTileOutputs + 4 * (n + 16 * v));
      }
      for (int r = 0; r < R; ++r) {
        const X four = LoadActivations(x + r * stride + k);
        for (int v = 0; v < kVecs; ++v) sum[r][v] = Dot4(sum[r][v], w[v], four);
      }
    }
    for (int r = 0; r < R; ++r) {
      const F scale = Set1(q.scales[r * q.groups + group]);
      for (int v = 0; v < kVecs; ++v) {
        float* to = sums + r * kTileOutputs + n + 16 * v;
        Store(to, Fma(ToFloat(sum[r][v]), scale * Load(weight_scales + n + 16 * v), Load(to)));
      }
    }
  }
}

// Both groups of a tile, in order.
template <int R>
void DotTile(const QuantizedRows& q, int index, const uint8_t* tile, const float* weight_scales,
             float* sums) {
  for (int g = 0; g < kTileGroups; ++g) {
    DotRows<R>(q, index * kTileGroups + g, tile + g * kGroup * kTileOutputs,
               weight_scales + g * kTileOutputs, sums);
  }
}

// Finds the weight rows of tile `index` along the summed dimension (kInputRows). Rows past the end
// are the last one again: their activations are zero.
void FindInputRows(const TileTask& t, int index, const uint8_t** rows) {
  const uint8_t* base = static_cast<const uint8_t*>(t.values);
  const int size = t.int8 ? 1 : sizeof(float);
  for (int i = 0; i < kTileDepth; ++i) {
    const int k = Least(index * kTileDepth + i, t.depth - 1);
    rows[i] = base + (WeightRow(t, k) + t.first_output) * size;
  }
}

// int8: [depth / 4][outputs][4]; fp32: [depth][outputs].
void PackTile(const TileTask& t, int index, const uint8_t** rows, uint8_t* panel) {
  if (t.output_rows) {
    const int64_t row_bytes = t.int8 ? kTileDepth : kTileDepth * sizeof(float);
    const int64_t dst_stride = kTileOutputs * sizeof(float);
    for (int n = 0; n < kTileOutputs; n += 16) {
      for (int64_t at = 0; at < row_bytes; at += 64) {
        uint8_t* dst = panel + at / 4 * dst_stride + 4 * n;
        if (t.int8) {
          Transpose16<true>(rows + n, index * row_bytes + at, dst, dst_stride);
        } else {
          Transpose16<false>(rows + n, index * row_bytes + at, dst, dst_stride);
        }
      }
      // The next tile's lines of the same rows: too short a run for the hardware to foresee.
      if (t.int8) {
        for (int i = 0; i < 16; ++i) __builtin_prefetch(rows[n + i] + (index + 1) * row_bytes);
      }
    }
    return;
  }
  FindInputRows(t, index, rows);
  if (!t.int8) {
    for (int k = 0; k < kTileDepth; ++k) {
      __builtin_memcpy(panel + k * kTileOutputs * sizeof(float), rows[k],
                       kTileOutputs * sizeof(float));
    }
    return;
  }
  for (int k = 0; k < kTileDepth; k += 4) Interleave4(rows + k, 0, panel + k * kTileOutputs);
}

// Scales of the tile's outputs for tiles [first, first + kPanelTiles), group by group. Reads past
// the end of a row of scales, into the next row or the slack behind the last.
void GatherScales(const TileTask& t, int first, TileScratch* s) {
  const uint8_t* rows[kTileOutputs];
  for (int i = 0; i < kTileOutputs; ++i) {
    const int output = t.first_output + Least(i, t.outputs - 1);
    rows[i] = reinterpret_cast<const uint8_t*>(
        t.scales +
        static_cast<int64_t>(t.list != nullptr ? t.list[output] : output) * t.scale_stride);
  }
  constexpr int kGroups = kPanelTiles * kTileGroups;
  for (int n = 0; n < kTileOutputs; n += 16) {
    for (int g = 0; g < kGroups; g += 16) {
      Transpose16<false>(rows + n, (static_cast<int64_t>(first) * kTileGroups + g) * sizeof(float),
                         reinterpret_cast<uint8_t*>(s->scales + g * kTileOutputs + n),
                         kTileOutputs * sizeof(float));
    }
  }
}

// The same for kInputRows, whose scales lie by group already, in the order of an interleaved tile.
// A last tile may have one group of rows only; its second has no activations either.
void CopyScales(const TileTask& t, int first, int end, TileScratch* s) {
  const int last = (t.depth + kGroup - 1) / kGroup - 1;
  for (int g = first * kTileGroups; g < end * kTileGroups; ++g) {
    const float* from = t.scales + Least(g, last) * t.scale_stride + t.first_output;
    float* to = s->scales + (g - first * kTileGroups) * kTileOutputs;
    for (int n = 0; n < kTileOutputs; n += 16) Store(to + n, Load(from + n));
    RestoreOrder(to);  // its own inverse
  }
}

void MultiplyRows(const TileTask& t, int index, const uint8_t* tile, const float* weight_scales,
                  int first, int end, float* sums) {
  int r = first;
  if (t.int8) {
    QuantizedRows q = t.q;
    const auto at = [&](int row) {
      q.values = t.q.values + static_cast<int64_t>(row) * q.groups * kGroup;
      q.scales = t.q.scales + static_cast<int64_t>(row) * q.groups;
      q.offsets = t.q.offsets + static_cast<int64_t>(row) * q.groups;
      return sums + static_cast<int64_t>(row) * kTileOutputs;
    };
    for (; r + kRows <= end; r += kRows) {
      float* to = at(r);
      DotTile<kRows>(q, index, tile, weight_scales, to);
    }
    if (kRows > 2 && r + 2 <= end) {
      float* to = at(r);
      DotTile<2>(q, index, tile, weight_scales, to);
      r += 2;
    }
    if (r < end) {
      float* to = at(r);
      DotTile<1>(q, index, tile, weight_scales, to);
    }
    return;
  }
  const float* b = reinterpret_cast<const float*>(tile);
  const int depth = Least(kTileDepth, t.depth - index * kTileDepth);
  const float* x = t.x + static_cast<int64_t>(index) * kTileDepth;
  for (; r + kRows <= end; r += kRows) {
    FmaRows<kRows>(x + r * t.x_stride, t.x_stride, depth, b, kTileOutputs, kTileOutputs,
                   sums + r * kTileOutputs, kTileOutputs);
  }
  for (; r < end; ++r) {
    FmaRows<1>(x + r * t.x_stride, t.x_stride, depth, b, kTileOutputs, kTileOutputs,
               sums + r * kTileOutputs, kTileOutputs);
  }
}

void StoreSums(const TileTask& t, float* sums) {
  for (int r = 0; r < t.rows; ++r) {
    float* from = sums + r * kTileOutputs;
    float* to = t.out + r * t.out_stride;
    if (t.int8 && !t.output_rows) RestoreOrder(from);
    for (int n = 0; n < t.outputs; n += 16) {
      const int width = Least(16, t.outputs - n);
      F v = Load(from + n);
      if (t.bias != nullptr) v = v + LoadFirst(t.bias + n, width);
      if (t.add) v = LoadFirst(to + n, width) + v;
      StoreFirst(to + n, v, width);
    }
  }
}

void MatMulTile(const TileTask& t, TileScratch* s) {
  const int tiles = (t.depth + kTileDepth - 1) / kTileDepth;
  const int64_t tile_bytes = kTileDepth * kTileOutputs * (t.int8 ? 1 : sizeof(float));
  for (int i = 0; i < t.rows * kTileOutputs; i += 16) Store(s->sums + i, Set1(0));
  if (t.output_rows) {
    const uint8_t* base = static_cast<const uint8_t*>(t.values);
    for (int i = 0; i < kTileOutputs; ++i) {  // outputs past the end repeat the last
      const int64_t row = WeightRow(t, t.first_output + Least(i, t.outputs - 1));
      s->weight_rows[i] = base + row * (t.int8 ? 1 : static_cast<int64_t>(sizeof(float)));
    }
  }
  for (int first = 0; first < tiles; first += kPanelTiles) {
    const int end = Least(tiles, first + kPanelTiles);
    if (t.int8 && t.output_rows) GatherScales(t, first, s);
    if (t.int8 && !t.output_rows) CopyScales(t, first, end, s);
    for (int row = 0; row < t.rows; row += kRowBlock) {
      for (int index = first; index < end; ++index) {
        // With one block of rows no tile is needed twice: keep the one that is in L1.
        uint8_t* tile = s->panel + (t.rows <= kRowBlock ? 0 : (index - first) * tile_bytes);
        if (row == 0) PackTile(t, index, s->weight_rows, tile);
        MultiplyRows(t, index, tile, s->scales + (index - first) * kTileGroups * kTileOutputs, row,
                     Least(t.rows, row + kRowBlock), s->sums);
      }
    }
  }
  StoreSums(t, s->sums);
}
