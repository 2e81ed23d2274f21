// Memory that knows of each byte whether it is anyone's, was ever written, and by which threads of
// a kernel it was touched when, and so sees accesses out of bounds, uninitialised reads and races.
#pragma once

#include <array>
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
  kStream,       // of a launch: none, or not the device's
  kPartialWarp,  // a vote or shuffle of some lanes only
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

// Of one kind of access to a byte, those that are enough to see every race, if all are told in
// order and blocks run one after the other: of the last block the latest of two threads, and the
// latest of a block before. A later access that is unordered with any other is so with one of
// these.
class Trail {
 public:
  void Add(const Access& access);
  // One that does not come before `access`; null if there is none.
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
    std::array<Trail, 3> trails;  // by AccessKind
  };

  const std::string name_;
  const size_t capacity_;
  const std::unique_ptr<std::byte[]> memory_;
  std::byte* const begin_;  // at a multiple of the alignment
  std::vector<Byte> bytes_;
};

void AddFault(FaultKind kind, const void* where, std::string text, std::vector<Fault>* faults);

}  // namespace espalier::simt
