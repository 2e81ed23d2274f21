// Packing and unpacking of 2:4 matrices on a device, in the form of kernels/sparse24.h and to the
// same bits.
//
// Calls only enqueue, on `stream`, never the default one (null), and return CUDA's error number: 0,
// or 1 (invalid value) for a shape that is none or has 2^31 blocks. Pointers are to memory of the
// device, `values` at a multiple of 8 bytes and `kept` of 4, as what is allocated there is.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace espalier::cuda {

// What `*refused` must hold before a call, and still holds after one that refused nothing. Else it
// is output * groups of an output + group, of the first group that is refused, and what was written
// is of no use.
inline constexpr unsigned long long kNoneRefused = ~0ULL;

// `values` [outputs, depth], `depth` in whole groups of four, to `kept` [outputs, depth / 2] and
// `places` [outputs, depth / 16 rounded up]. Refuses groups of more than two that are not zero.
int PackSparse24(const uint16_t* values, int outputs, int depth, uint16_t* kept, uint16_t* places,
                 unsigned long long* refused, CUstream_st* stream);

// Back. Refuses groups whose places do not ascend.
int UnpackSparse24(const uint16_t* kept, const uint16_t* places, int outputs, int depth,
                   uint16_t* values, unsigned long long* refused, CUstream_st* stream);

}  // namespace espalier::cuda
