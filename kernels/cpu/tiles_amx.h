// The tile instructions that products of integers need. Included by kernels_amx.cc inside its own
// namespace; tests/kernels/tile_model.h says in plain C++ what they do.
//
// As assembler, because the intrinsics of GCC 12 do not tell the compiler what memory they read,
// and take no tile's number from a template.
#pragma once

void TileConfigure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
void TileRelease() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
void TileZero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows lie `stride` bytes apart.
template <int kTile>
void TileLoad(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
void TileStore(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += a[m][4 k + j] * b[k][4 n + j] over k and j < 4; a's bytes are signed, b's are not.
template <int kSum, int kA, int kB>
void TileDot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}
