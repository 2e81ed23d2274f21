// Loops that do nothing but multiply and add in registers: the arithmetic peak of one core.
//
// One translation unit per instruction set, compiled for it; call only what the machine supports.
#pragma once

#include <cstdint>

namespace espalier {

struct PeakLoops {
  // Run `iterations` rounds and return the operations done; a multiply-add counts two.
  double (*f32)(int64_t iterations);
  double (*int8)(int64_t iterations);  // int8 products summed to int32
};

extern const PeakLoops kPortablePeakLoops;
#ifdef ESPALIER_X86
extern const PeakLoops kAvx2PeakLoops;
extern const PeakLoops kAvxVnniPeakLoops;
extern const PeakLoops kAvx512PeakLoops;
#endif

}  // namespace espalier
