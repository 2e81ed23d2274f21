// The kernels of each instruction set.
#pragma once

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kernel_table.h"

namespace espalier {

// `isa` is supported.
const KernelTable& KernelsOf(Isa isa);

}  // namespace espalier
