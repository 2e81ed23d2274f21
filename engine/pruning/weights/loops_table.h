// What each instruction set's file of loops gives; included by those files and loops.cc alone.
//
// Those files include nothing of the standard library that has code: an inline function compiled
// for AVX-512 might be the copy that the linker keeps for all.
#pragma once

#include <cstdint>

#include "engine/pruning/weights/loops.h"
#include "engine/pruning/weights/pattern.h"

namespace espalier {

const WeightLoops& PortableWeightLoops();
const WeightLoops& Avx2WeightLoops();
const WeightLoops& Avx512WeightLoops();

}  // namespace espalier
