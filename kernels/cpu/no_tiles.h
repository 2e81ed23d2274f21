// What an instruction set without tiles has in place of body_tiles.h: no row is theirs.
#pragma once

template <int V, typename Fetch>
int DotTiles(const MatMulTask&, int, int, int, MatMulScratch*, const Fetch&) {
  return 0;
}
