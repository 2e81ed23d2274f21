// Copies of the 2:4 kernels with one mistake each (mutants.py), for the checker to find.
#pragma once

#include <vector>

#include "kernels/cuda/sparse24.h"
#include "tests/simt/checked_memory.h"

namespace espalier::simt {

struct Mutant {
  const char* name;
  std::vector<FaultKind> found_by;  // one of them; none where results tell, and nothing else
  decltype(&cuda::PackSparse24) pack;
  decltype(&cuda::UnpackSparse24) unpack;
};

extern const std::vector<Mutant> kMutants;

}  // namespace espalier::simt
