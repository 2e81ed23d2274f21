// What other processes hold of this machine's memory.
#pragma once

#include <cstdint>

namespace espalier {

// Bytes in use on the machine (or in the memory cgroup's view of /proc) that are not ours; 0 if
// /proc does not tell. Some 50 us: for a scrape or a call, not for a step.
uint64_t ForeignMemoryBytes();

}  // namespace espalier
