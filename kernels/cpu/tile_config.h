// How AMX tiles are cut, as LDTILECFG reads it. Included by kernels_amx.cc inside its own
// namespace.
#pragma once

struct alignas(64) TileConfig {
  uint8_t palette = 1;  // eight tiles of up to 16 rows of 64 bytes
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // by tile
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);
