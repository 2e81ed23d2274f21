// AMX in plain C++: what kernels/cpu/tiles_amx.h offers, by Intel's description of the
// instructions. Included in its stead; crashes where a processor would raise a fault.
#pragma once

struct Tile {
  int rows = 0;  // 0: not configured
  int row_bytes = 0;
  uint8_t bytes[16][64] = {};
};
thread_local Tile tiles[8];
thread_local bool tiles_configured = false;
thread_local int64_t tile_dots = 0;  // done so far

void FaultUnless(bool holds) {
  if (!holds) __builtin_trap();
}

// Tiles are zero after configuration.
void TileConfigure(const TileConfig& config) {
  FaultUnless(config.palette == 1 && config.start_row == 0);
  for (const uint8_t byte : config.reserved) FaultUnless(byte == 0);
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], row_bytes = config.row_bytes[i];
    FaultUnless(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0));
    FaultUnless(i < 8 || rows == 0);
    if (i < 8) tiles[i] = {.rows = rows, .row_bytes = row_bytes};
  }
  tiles_configured = true;
}
void TileRelease() {
  for (Tile& tile : tiles) tile = {};
  tiles_configured = false;
}

template <int kTile>
Tile& Configured() {
  static_assert(kTile >= 0 && kTile < 8);
  FaultUnless(tiles_configured && tiles[kTile].rows > 0);
  return tiles[kTile];
}

template <int kTile>
void TileZero() {
  Tile& tile = Configured<kTile>();
  __builtin_memset(tile.bytes, 0, sizeof tile.bytes);
}
template <int kTile>
void TileLoad(const void* from, int64_t stride) {
  TileZero<kTile>();
  Tile& tile = Configured<kTile>();
  for (int r = 0; r < tile.rows; ++r) {
    __builtin_memcpy(tile.bytes[r], static_cast<const uint8_t*>(from) + r * stride, tile.row_bytes);
  }
}
template <int kTile>
void TileStore(void* to, int64_t stride) {
  const Tile& tile = Configured<kTile>();
  for (int r = 0; r < tile.rows; ++r) {
    __builtin_memcpy(static_cast<uint8_t*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
  }
}
template <int kSum, int kA, int kB>
void TileDot() {
  static_assert(kSum != kA && kSum != kB && kA != kB);
  Tile& sum = Configured<kSum>();
  const Tile &a = Configured<kA>(), &b = Configured<kB>();
  FaultUnless(sum.rows == a.rows && sum.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
  FaultUnless(a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0);
  for (int m = 0; m < a.rows; ++m) {
    for (int n = 0; n < b.row_bytes / 4; ++n) {
      int32_t total;
      __builtin_memcpy(&total, sum.bytes[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k) {
        for (int j = 0; j < 4; ++j) {
          total += static_cast<int8_t>(a.bytes[m][4 * k + j]) * b.bytes[k][4 * n + j];
        }
      }
      __builtin_memcpy(sum.bytes[m] + 4 * n, &total, 4);
    }
  }
  ++tile_dots;
}
