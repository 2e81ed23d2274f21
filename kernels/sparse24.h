// Matrices of which every four consecutive summed values keep at most two (2:4): whether one is,
// and its compressed form, for devices that multiply by it.
//
// The form is what NVIDIA's sparse tensor cores take before a kernel reorders it for its tiles: of
// each group of four its two kept values, in order, and for each of those its place in the group in
// two bits. A 16-bit matrix takes 9/16 of its bytes so.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace espalier {

inline constexpr int kSparseGroup = 4;
inline constexpr int kSparseKept = 2;

// Whether each group of four, from the first value on, holds at most two that are not zero; so must
// a shorter last one.
bool IsSparse24(std::span<const float> values);

// Values are of 16 bits, bf16 or fp16: the form does not depend on which.
struct Sparse24 {
  int outputs = 0;
  int depth = 0;               // summed values, in whole groups
  std::vector<uint16_t> kept;  // [outputs, depth / 2]
  std::vector<uint16_t>
      places;  // [outputs, depth / 16 rounded up]: a group in four bits, the first
               // in the lowest; of its two places the lower one in the lower two
};

// `values` [outputs, depth]. A group with fewer than two keeps zeros beside them, since places
// ascend. InvalidArgument, with output and value, for a group of more than two, and for a depth
// that is no multiple of four.
absl::StatusOr<Sparse24> CompressSparse24(std::span<const uint16_t> values, int outputs, int depth);

// The matrix again, [outputs, depth], bit for bit but for the sign of zeros that were left out.
// InvalidArgument, with output and group, for places that do not ascend.
absl::StatusOr<std::vector<uint16_t>> ExpandSparse24(const Sparse24& sparse);

}  // namespace espalier
