// What -fsanitize=thread makes the compiler call before each load and store of a kernel. It is
// asked for those calls only: its own runtime is not linked, and these functions stand in for it.
// One that is missing here is named by the linker.
#include <cstddef>
#include <cstring>

#include "tests/simt/emulator.h"

using espalier::simt::AccessKind;
using espalier::simt::CheckAccess;

// NOLINTBEGIN(bugprone-reserved-identifier,bugprone-macro-parentheses)
#define CALLER __builtin_return_address(0)

#define HOOKS_OF(kind, access)                                              \
  void __tsan_##kind##1(void* at) { CheckAccess(at, 1, access, CALLER); }   \
  void __tsan_##kind##2(void* at) { CheckAccess(at, 2, access, CALLER); }   \
  void __tsan_##kind##4(void* at) { CheckAccess(at, 4, access, CALLER); }   \
  void __tsan_##kind##8(void* at) { CheckAccess(at, 8, access, CALLER); }   \
  void __tsan_##kind##16(void* at) { CheckAccess(at, 16, access, CALLER); } \
  void __tsan_##kind##_range(void* at, size_t bytes) { CheckBytes(at, bytes, access, CALLER); }

namespace {

// Of a struct, which has no alignment of its own.
void CheckBytes(const void* at, size_t bytes, AccessKind kind, const void* where) {
  for (size_t i = 0; i < bytes; ++i) CheckAccess(static_cast<const char*>(at) + i, 1, kind, where);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

HOOKS_OF(read, AccessKind::kRead)
HOOKS_OF(write, AccessKind::kWrite)

void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  CheckBytes(from, bytes, AccessKind::kRead, CALLER);
  CheckBytes(to, bytes, AccessKind::kWrite, CALLER);
  return std::memmove(to, from, bytes);
}

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  CheckBytes(from, bytes, AccessKind::kRead, CALLER);
  CheckBytes(to, bytes, AccessKind::kWrite, CALLER);
  return std::memcpy(to, from, bytes);
}

void* __tsan_memset(void* to, int value, size_t bytes) {
  CheckBytes(to, bytes, AccessKind::kWrite, CALLER);
  return std::memset(to, value, bytes);
}

}  // extern "C"
// NOLINTEND(bugprone-reserved-identifier,bugprone-macro-parentheses)
