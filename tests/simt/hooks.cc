// What -fsanitize=thread makes the compiler call before each load and store of a kernel. It is
// asked for those calls only: its own runtime is not linked, and these functions stand in for it.
// One that is missing here is named by the linker.
#include <cstddef>

#include "tests/simt/emulator.h"

using espalier::simt::AccessKind;
using espalier::simt::CheckAccess;

// Of a scalar, and of a struct.
#define HOOKS_OF(kind, access)                                                 \
  void __tsan_##kind##1(void* at) { CheckAccess(at, 1, access, CALLER); }      \
  void __tsan_##kind##2(void* at) { CheckAccess(at, 2, access, CALLER); }      \
  void __tsan_##kind##4(void* at) { CheckAccess(at, 4, access, CALLER); }      \
  void __tsan_##kind##8(void* at) { CheckAccess(at, 8, access, CALLER); }      \
  void __tsan_##kind##16(void* at) { CheckAccess(at, 16, access, CALLER); }    \
  void __tsan_##kind##_range(char* at, size_t bytes) {                         \
    for (size_t i = 0; i < bytes; ++i) CheckAccess(at + i, 1, access, CALLER); \
  }
#define CALLER __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

HOOKS_OF(read, AccessKind::kRead)
HOOKS_OF(write, AccessKind::kWrite)

}  // extern "C"
