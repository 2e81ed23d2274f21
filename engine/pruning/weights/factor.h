// The factor that Optimal Brain Surgeon walks along: upper triangular U with U^T U = H^-1.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace espalier {

// Replaces the symmetric `matrix` [n, n] by U, with zeros below the diagonal. First `damping` of
// the mean of the diagonal is added to it; a column that was never seen (0 on the diagonal) becomes
// an independent one of 1. In blocks whose products the backend's workers make in fp32; blocks on
// the diagonal in fp64. InvalidArgument if it is still not positive definite, or not finite.
//
// With H = R R^T and R upper, which is Cholesky from the last row up, U is R^-1: one factorisation
// and one triangular inverse, where inverting H and factoring that takes twice as much.
absl::Status ToInverseFactor(int n, double damping, Backend* backend, std::vector<float>* matrix);

// The same of a small matrix [n, n], n <= 64, in fp64 by the calling thread: U goes to `factor`,
// rows `stride` apart. `damping` is added to the diagonal as it is. False if not positive definite.
bool ToSmallInverseFactor(int n, double damping, const float* matrix, int64_t stride,
                          float* factor);

}  // namespace espalier
