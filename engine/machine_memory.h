// How much of this machine's memory this process may have, and what others hold of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace espalier {

// Bytes, by /proc/meminfo and the memory limits of the process's cgroup and its ancestors, v1 and
// v2, whichever is least; of v2 memory.high too, beyond which the kernel slows who allocates. What
// the kernel can drop without swapping (the page cache, where a model's file lies; of a cgroup's,
// the inactive part) counts as available.
struct MachineMemory {
  uint64_t total = 0;
  uint64_t available = 0;
  // Of the last ten seconds, the share in which some task waited for memory, by the kernel's
  // pressure stall information of the machine or of a cgroup as above, whichever is most; none
  // where the kernel does not tell.
  std::optional<double> stalled;
};

// `root` is put before /proc and /sys paths.
MachineMemory ReadMachineMemory(const std::string& root = "");

// What of this process lies in memory, without what it shares with files.
uint64_t ResidentMemoryBytes(const std::string& root = "");

// What is neither available nor this process's own. Some 300 us: for a scrape or a call, not for a
// step.
uint64_t ForeignMemoryBytes(const std::string& root = "");

}  // namespace espalier
