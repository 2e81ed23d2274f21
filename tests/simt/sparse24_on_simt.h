// Matrices for the 2:4 kernels, and what comes of them on the emulator.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/sparse24.h"
#include "kernels/sparse24.h"
#include "tests/simt/emulator.h"

namespace espalier::simt {

// [outputs, depth]: of each group two places are drawn, one twice at times, for values of any bits.
std::vector<uint16_t> RandomSparse24(int outputs, int depth, uint32_t seed);

struct PackedOnSimt {
  int error;  // CUDA's
  Sparse24 sparse;
  unsigned long long refused;
  std::vector<Fault> faults;
};
PackedOnSimt PackOnSimt(decltype(&cuda::PackSparse24) pack, const std::vector<uint16_t>& values,
                        int outputs, int depth, uint32_t seed);

struct UnpackedOnSimt {
  int error;
  std::vector<uint16_t> values;
  unsigned long long refused;
  std::vector<Fault> faults;
};
UnpackedOnSimt UnpackOnSimt(decltype(&cuda::UnpackSparse24) unpack, const Sparse24& sparse,
                            uint32_t seed);

}  // namespace espalier::simt
