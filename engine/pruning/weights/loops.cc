#include "engine/pruning/weights/loops.h"

#include "engine/pruning/weights/loops_table.h"

namespace espalier {

const WeightLoops& WeightLoopsOf(Isa isa) {
#ifdef ESPALIER_X86
  switch (isa) {
    case Isa::kPortable:
      return PortableWeightLoops();
    case Isa::kAvx2:
    case Isa::kAvxVnni:
      return Avx2WeightLoops();
    case Isa::kAvx512Vnni:
    case Isa::kAmx:
      return Avx512WeightLoops();
  }
#endif
  static_cast<void>(isa);
  return PortableWeightLoops();
}

const WeightLoops& BestWeightLoops() {
  static const WeightLoops& best = WeightLoopsOf(SupportedIsas().back());
  return best;
}

}  // namespace espalier
