#include "tests/simt/checked_memory.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "fmt/format.h"

namespace espalier::simt {
namespace {

constexpr size_t kAlignment = 256, kGap = 256;

// NaN as a float, and far out of range as an index.
constexpr int kRubbish = 0xff;

std::byte* Aligned(std::byte* memory, size_t capacity) {
  void* at = memory;
  size_t space = capacity + kAlignment;
  return static_cast<std::byte*>(std::align(kAlignment, capacity, at, space));
}

// No synchronisation but a block's barrier is known; shuffles and votes order nothing.
bool Ordered(const Access& earlier, const Access& later) {
  if (earlier.launch != later.launch) return true;
  if (earlier.block != later.block) return false;
  return earlier.thread == later.thread || earlier.barriers < later.barriers;
}

// For `addr2line -e program`. A caller returns behind its call, which may be the next line.
std::string Where(const void* code) {
  Dl_info module;
  if (dladdr(code, &module) == 0) return fmt::format("{}", code);
  return fmt::format(
      "{}+{:#x}", module.dli_fname,
      static_cast<const char*>(code) - 1 - static_cast<const char*>(module.dli_fbase));
}

std::string Words(const Access& access) {
  constexpr const char* kKinds[] = {"read", "write", "atomic"};
  return fmt::format("{} of block {}, thread {}, at {}", kKinds[static_cast<int>(access.kind)],
                     access.block, access.thread, Where(access.where));
}

}  // namespace

void AddFault(FaultKind kind, const void* where, std::string text, std::vector<Fault>* faults) {
  const auto same = [&](const Fault& fault) { return fault.kind == kind && fault.where == where; };
  if (std::ranges::none_of(*faults, same)) faults->push_back({kind, where, std::move(text)});
}

void Trail::Add(const Access& access) {
  if (last_.launch != access.launch) {
    other_thread_ = other_block_ = {};
  } else if (last_.block != access.block) {
    other_block_ = last_;
    other_thread_ = {};
  } else if (last_.thread != access.thread) {
    other_thread_ = last_;
  }
  last_ = access;
}

const Access* Trail::Unordered(const Access& access) const {
  for (const Access* earlier : {&last_, &other_thread_, &other_block_}) {
    if (earlier->launch != 0 && !Ordered(*earlier, access)) return earlier;
  }
  return nullptr;
}

CheckedMemory::CheckedMemory(std::string name, size_t capacity)
    : name_(std::move(name)),
      capacity_(capacity),
      memory_(std::make_unique_for_overwrite<std::byte[]>(capacity + kAlignment)),
      begin_(Aligned(memory_.get(), capacity)) {}

std::byte* CheckedMemory::Allocate(size_t bytes) {
  const size_t begin = (bytes_.size() + kGap + kAlignment - 1) / kAlignment * kAlignment;
  if (begin + bytes + kGap > capacity_) return nullptr;
  bytes_.resize(begin);
  bytes_.resize(begin + bytes, Byte{.allocated = true});
  std::memset(begin_ + begin, kRubbish, bytes);
  return begin_ + begin;
}

void CheckedMemory::Clear() { bytes_.clear(); }

bool CheckedMemory::Contains(const void* at) const {
  return at >= begin_ && at < begin_ + capacity_;
}

void CheckedMemory::MarkWritten(const void* at, size_t bytes) {
  const size_t begin = static_cast<const std::byte*>(at) - begin_;
  for (size_t i = begin; i < begin + bytes; ++i) bytes_.at(i).written = true;
}

bool CheckedMemory::IsWritten(const void* at, size_t bytes) const {
  const size_t begin = static_cast<const std::byte*>(at) - begin_;
  for (size_t i = begin; i < begin + bytes; ++i) {
    if (!bytes_.at(i).written) return false;
  }
  return true;
}

void CheckedMemory::Check(const void* at, size_t bytes, const Access& access,
                          std::vector<Fault>* faults) {
  const size_t begin = static_cast<const std::byte*>(at) - begin_;
  const auto add = [&](FaultKind kind, const std::string& what) {
    AddFault(kind, access.where,
             fmt::format("{} bytes of {} memory: {} {}", bytes, name_, Words(access), what),
             faults);
  };
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) add(FaultKind::kMisaligned, "is misaligned");
  for (size_t i = begin; i < begin + bytes; ++i) {
    if (i >= bytes_.size() || !bytes_[i].allocated) {
      add(FaultKind::kOutOfBounds, "is out of bounds");
      continue;
    }
    Byte& byte = bytes_[i];
    if (access.kind != AccessKind::kWrite && !byte.written) {
      add(FaultKind::kUninitialised, "finds nothing written");
    }
    for (const AccessKind kind : {AccessKind::kWrite, AccessKind::kAtomic, AccessKind::kRead}) {
      if (kind == access.kind && kind != AccessKind::kWrite) continue;
      const Access* const other = byte.trails[static_cast<int>(kind)].Unordered(access);
      if (other == nullptr) continue;
      add(FaultKind::kRace, fmt::format("is not ordered after the {}", Words(*other)));
    }
    byte.trails[static_cast<int>(access.kind)].Add(access);
    if (access.kind != AccessKind::kRead) byte.written = true;
  }
}

}  // namespace espalier::simt
