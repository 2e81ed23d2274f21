// Products for AVX-512 with AMX, whose tiles multiply integers where there are rows enough. Nothing
// else differs from AVX-512's table.
#include <immintrin.h>

#include "kernels/cpu/kernel_table.h"

namespace espalier {
namespace {

// clang-format off: the order matters
#include "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/tile_config.h"
#include "kernels/cpu/tiles_amx.h"
#include "kernels/cpu/body_tiles.h"
#include "kernels/cpu/body_matmul.h"
// clang-format on

}  // namespace

void AmxMatMul(const MatMulTask& task, MatMulScratch* scratch) { MatMulWithTiles(task, scratch); }

}  // namespace espalier
