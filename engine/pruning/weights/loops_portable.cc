// The loops, compiled with the flags of this file's instruction set.
#include "engine/pruning/weights/loops_table.h"

namespace espalier {
namespace {

#include "engine/pruning/weights/loops_body.h"

}  // namespace

const WeightLoops& PortableWeightLoops() { return kLoops; }

}  // namespace espalier
