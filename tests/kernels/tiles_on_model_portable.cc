#include "kernels/cpu/kernel_table.h"
#include "tests/kernels/tiles_on_model.h"

namespace espalier {
namespace {

// clang-format off: the order matters
#include "kernels/cpu/half.h"
#include "kernels/cpu/lanes_portable.h"
#include "kernels/cpu/tile_config.h"
#include "tests/kernels/tile_model.h"
#include "kernels/cpu/body_tiles.h"
#include "kernels/cpu/body_matmul.h"
// clang-format on

}  // namespace

int64_t MatMulOnModelTilesPortable(const MatMulTask& task, MatMulScratch* scratch) {
  const int64_t before = tile_dots;
  MatMulWithTiles(task, scratch);
  return tile_dots - before;
}

}  // namespace espalier
