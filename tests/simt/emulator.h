// A CUDA device in the host's own thread: it gives the words of kernels/cuda/arch.cuh their
// meaning, runs each thread of a kernel as a fiber, in an order that a seed chooses, and tells what
// kernels do wrong (FaultKind).
//
// Kernels are compiled by espalier_kernels_for_simt (CMakeLists.txt), so that the compiler tells
// each of their loads and stores (hooks.cc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/simt/checked_memory.h"

struct CUstream_st;

namespace espalier::simt {

// While it lives, kernels launched from this thread run on it, before the launch returns. One at a
// time in a thread.
class Device {
 public:
  // Threads run in the order of their numbers for seed 0, backwards for 1, else shuffled anew each
  // time that all have met or left; so do blocks.
  explicit Device(uint32_t seed);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // The one that kernels are to be launched on: null, CUDA's default stream, is a fault.
  CUstream_st* stream() { return reinterpret_cast<CUstream_st*>(this); }

  // Uninitialised; 1 MiB in all, given back with the device.
  template <class T>
  T* Allocate(size_t count) {
    return reinterpret_cast<T*>(AllocateBytes(count * sizeof(T)));
  }
  template <class T>
  T* Upload(const std::vector<T>& values) {
    T* const at = Allocate<T>(values.size());
    std::ranges::copy(values, at);
    memory_.MarkWritten(at, values.size() * sizeof(T));
    return at;
  }
  // A fault where they are not all written.
  template <class T>
  std::vector<T> Download(const T* at, size_t count) {
    CheckWritten(at, count * sizeof(T), __builtin_return_address(0));
    return std::vector<T>(at, at + count);
  }

  const std::vector<Fault>& faults() const { return faults_; }

 private:
  friend class Grid;
  friend void CheckArgument(const void* pointer);
  friend void CheckStream(const CUstream_st* stream);

  std::byte* AllocateBytes(size_t bytes);
  void CheckWritten(const void* at, size_t bytes, const void* where);

  const uint32_t seed_;
  std::mt19937 random_;
  CheckedMemory memory_;
  CheckedMemory shared_;
  std::vector<Fault> faults_;
  uint32_t launches_ = 0;
};

// By a kernel's thread, at `where` in the code; whatever is no memory of the device is let be.
void CheckAccess(const void* at, size_t bytes, AccessKind kind, const void* where);

}  // namespace espalier::simt
