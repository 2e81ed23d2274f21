// The product code for tiles, compiled with a model of them, once for each kind of lanes.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace espalier {

// KernelTable::matmul; returns how many tiles were multiplied.
int64_t MatMulOnModelTilesPortable(const MatMulTask& task, MatMulScratch* scratch);
#if defined(__x86_64__)
int64_t MatMulOnModelTilesAvx512(const MatMulTask& task, MatMulScratch* scratch);
#endif

}  // namespace espalier
