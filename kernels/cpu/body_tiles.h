// Products of integers, sixteen rows at a time, on tiles. Included before body_matmul.h, after
// lanes on which bytes are multiplied as they lie in memory, tile_config.h and what tiles can do.
//
// A tile's sum is a group's, exactly, and is then scaled and added as on lanes: same bits.
#pragma once

constexpr int kTileRows = 16;
constexpr int kTileStrips = 4;

// Tile 0: activations of a group. 1 to 3: blocks of weights. 4 to 7: sums of four strips.
constexpr int kFirstBlockTile = 1;
constexpr int kBlockTiles = 3;
constexpr int kFirstSumTile = 4;

TileConfig TilesOfGroups() {
  TileConfig config;
  const auto cut = [&](int tile, int rows, int row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  };
  cut(0, kTileRows, kGroup);
  for (int i = 0; i < kBlockTiles; ++i) cut(kFirstBlockTile + i, kGroup / 4, 4 * kStripOutputs);
  for (int i = 0; i < kTileStrips; ++i) cut(kFirstSumTile + i, kTileRows, 4 * kStripOutputs);
  return config;
}

using TileSums = int32_t[kTileRows][kTaskOutputs];

// The sums of sixteen rows and one group with strips v and on.
template <int V, int v>
void SumStrips(const uint8_t* const* blocks, TileSums& sums) {
  constexpr int kBlock = kFirstBlockTile + v % kBlockTiles, kSum = kFirstSumTile + v;
  TileLoad<kBlock>(blocks[v], 4 * kStripOutputs);
  TileZero<kSum>();
  TileDot<kSum, 0, kBlock>();
  TileStore<kSum>(&sums[0][kStripOutputs * v], sizeof(sums[0]));
  if constexpr (v + 1 < V) SumStrips<V, v + 1>(blocks, sums);
}

// Rows [begin, end) of a task by groups [first, first + groups) of V strips. The tile is those that
// end with `end`: a last one goes over rows that have been done, and leaves them alone.
template <int V>
void DotTile(const MatMulTask& t, int first, int groups, int strip, int begin, int end,
             MatMulScratch* s) {
  const int top = end - kTileRows;
  const int8_t* x = t.q.values + top * t.q.stride + static_cast<int64_t>(first) * kGroup;
  alignas(64) TileSums sums[2];
  // The sums of a group are added while the tiles make the next one's.
  for (int g = 0; g <= groups; ++g) {
    if (g < groups) {
      TileLoad<0>(x + g * kGroup, t.q.stride);
      SumStrips<V, 0>(s->blocks + g * kTaskStrips + strip, sums[g % 2]);
    }
    if (g == 0) continue;
    F scale[V], minimum[V];
    for (int v = 0; v < V; ++v) {
      scale[v] = Load(s->scales + (g - 1) * kTaskOutputs + 16 * (strip + v));
      minimum[v] = Load(s->minimums + (g - 1) * kTaskOutputs + 16 * (strip + v));
    }
    for (int r = begin; r < end; ++r) {
      const int64_t at = static_cast<int64_t>(r) * t.q.groups + first + g - 1;
      const F row_scale = Set1(t.q.scales[at]), total = Set1(t.q.sums[at]);
      float* out = s->sums + r * kTaskOutputs + 16 * strip;
      for (int v = 0; v < V; ++v) {
        const F exact = FinishSum<false>(LoadSum(&sums[(g - 1) % 2][r - top][16 * v])) * row_scale;
        const F sum = Fma(exact, scale[v], Load(out + 16 * v));
        Store(out + 16 * v, Fma(total, minimum[v], sum));
      }
    }
  }
}

// Whole tiles of a task's rows, and the rest if it is not few; how many rows that was.
template <int V, typename Fetch>
int DotTiles(const MatMulTask& t, int first, int groups, int strip, MatMulScratch* s,
             const Fetch& fetch) {
  constexpr int kFewRows = 3;  // take as long on lanes as a tile
  int begin = 0;
  while (t.rows >= kTileRows && t.rows - begin > kFewRows) {
    const int end = t.rows - begin < kTileRows ? t.rows : begin + kTileRows;
    for (int i = begin; i < end; i += kDotRows) fetch();
    DotTile<V>(t, first, groups, strip, begin, end, s);
    begin = end;
  }
  return begin;
}

void MatMul(const MatMulTask& t, MatMulScratch* s);

// Tiles are cut for each task, and given back: a thread that holds some has 8 KiB more to be saved
// whenever it is interrupted, and configuring takes a hundredth of the least task.
void MatMulWithTiles(const MatMulTask& t, MatMulScratch* s) {
  const bool tiles = t.bits <= 8 && t.rows >= kTileRows;
  if (tiles) TileConfigure(TilesOfGroups());
  MatMul(t, s);
  if (tiles) TileRelease();
}
