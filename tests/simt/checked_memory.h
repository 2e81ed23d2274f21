// Memory that knows of each byte whether it is anyone's, was ever written, and by which threads of
// a kernel it was touched when, and so sees accesses out of bounds, uninitialised reads and races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace espalier::simt {

enum class FaultKind {
  kOutOfBounds,
  kMisaligned,
  kUninitialised,
  kRace,
  kDivergence,   // threads that wait for ever: not all came to the same place
  kHostPointer,  // given to a kernel
};

struct Fault {
  FaultKind kind;
  const void* where;  // in the program's code
  std::string text;
};

enum class AccessKind { kRead, kWrite, kAtomic };

// One thread at one time.
struct Access {
  uint32_t launch = 0;    // from 1 on; 0 is nobody
  uint32_t block = 0;     // of the launch
  uint32_t thread = 0;    // of the block
  uint32_t barriers = 0;  // that its block had passed
  AccessKind kind = AccessKind::kRead;
  const void* where = nullptr;
};

// The accesses to a byte that can still race, if all are told in order: of the block that came last
// the latest of two threads, and the latest of another block. Each later access of the launch that
// is unordered with any of those left out is so with one of these.
class Trail {
 public:
  void Add(const Access& access);
  // One that neither comes before `access` nor is atomic as that is; null if there is none.
  const Access* Unordered(const Access& access) const;

 private:
  Access last_, other_thread_, other_block_;
};

class CheckedMemory {
 public:
  CheckedMemory(std::string name, size_t capacity);

  // Rubbish, between gaps that are nobody's, at a multiple of 256 bytes. Null beyond the capacity.
  std::byte* Allocate(size_t bytes);
  // Takes all back; a later allocation is uninitialised again.
  void Clear();
  bool Contains(const void* at) const;
  // By the host, within one allocation.
  void MarkWritten(const void* at, size_t bytes);
  bool IsWritten(const void* at, size_t bytes) const;
  // Checks an access, which is complete after the call, and adds what is wrong to `faults`, once
  // for each kind and place in the code.
  void Check(const void* at, size_t bytes, const Access& access, std::vector<Fault>* faults);

 private:
  struct Byte {
    bool allocated = false;
    bool written = false;
    Trail reads, writes;
  };

  const std::string name_;
  const size_t capacity_;
  const std::unique_ptr<std::byte[]> memory_;
  std::byte* const begin_;  // at a multiple of the alignment
  std::vector<Byte> bytes_;
};

void AddFault(FaultKind kind, const void* where, std::string text, std::vector<Fault>* faults);

}  // namespace espalier::simt
