// What a kernel may know of its machine, and the only header it includes beside its own: CUDA's
// words under nvcc, and elsewhere the same words as C++, which whoever links the kernels gives a
// meaning (tests/simt).
//
// Both halves have threadIdx, blockIdx, __syncthreads, __ballot_sync and __shfl_xor_sync (each with
// all lanes), __popc, __ffs, __clz, atomicMin, and two that are ours, SHARED_ARRAY and Launch.
// Grids have one dimension, blocks are of whole warps. A word comes in, in both halves, with the
// first kernel that needs it.
#pragma once

struct CUstream_st;

#if defined(__CUDACC__)

#include <cuda_runtime.h>

// An array of the block, uninitialised.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

namespace espalier {

// Enqueues the kernel; CUDA's error number, 0 for success. In place of <<<>>>, which is no C++.
template <class... Parameters, class... Arguments>
int Launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, CUstream_st* stream,
           Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace espalier

#else

#include <cstddef>
#include <type_traits>

namespace espalier::simt {

struct Index {
  unsigned x;
};

// A place in the source where threads meet. A line may have two, which differ by number.
struct Site {
  const char* file;
  int line;
  int number;
};

Index ThreadIndex();
Index BlockIndex();
void SyncThreads(Site site);
unsigned Ballot(Site site, unsigned lanes, bool vote);
unsigned ShuffleXor(Site site, unsigned lanes, unsigned value, int distance);
unsigned long long AtomicMin(unsigned long long* at, unsigned long long value);
// The same array for all threads of a block that give one key.
void* SharedArray(const void* key, size_t bytes);
// That a kernel is given no memory but the device's, and no stream but the device's.
void CheckArgument(const void* pointer);
void CheckStream(const CUstream_st* stream);
// Runs `thread(arguments)` as each thread.
int RunGrid(unsigned blocks, unsigned threads, void (*thread)(const void*), const void* arguments);

}  // namespace espalier::simt

// CUDA's names, which are reserved for it.
// NOLINTBEGIN(bugprone-reserved-identifier,bugprone-macro-parentheses)
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define threadIdx (::espalier::simt::ThreadIndex())
#define blockIdx (::espalier::simt::BlockIndex())

#define SIMT_SITE (::espalier::simt::Site{__FILE__, __LINE__, __COUNTER__})
#define __syncthreads() ::espalier::simt::SyncThreads(SIMT_SITE)
#define __ballot_sync(lanes, vote) ::espalier::simt::Ballot(SIMT_SITE, lanes, vote)
#define __shfl_xor_sync(lanes, value, distance) \
  ::espalier::simt::ShuffleXor(SIMT_SITE, lanes, value, distance)
#define SHARED_ARRAY(type, name, count)      \
  static constexpr char name##_key = 0;      \
  auto& name = *static_cast<type(*)[count]>( \
      ::espalier::simt::SharedArray(&name##_key, sizeof(type[count])))

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
  return espalier::simt::AtomicMin(at, value);
}
// NOLINTEND(bugprone-reserved-identifier,bugprone-macro-parentheses)

namespace espalier {

template <class... Parameters, class... Arguments>
int Launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, CUstream_st* stream,
           Arguments... arguments) {
  simt::CheckStream(stream);
  [[maybe_unused]] const auto check = [](auto argument) {
    if constexpr (std::is_pointer_v<decltype(argument)>) simt::CheckArgument(argument);
  };
  (check(arguments), ...);
  const auto call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  return simt::RunGrid(
      blocks, threads, [](const void* of) { (*static_cast<decltype(&call)>(of))(); }, &call);
}

}  // namespace espalier

#endif
