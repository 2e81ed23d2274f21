// Counts what a test program asks of operator new, in all threads; linking it replaces the
// operator.
#pragma once

#include <cstdint>

namespace espalier {

// Since the program's start.
int64_t Allocations();

}  // namespace espalier
