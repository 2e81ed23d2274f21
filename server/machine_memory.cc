#include "server/machine_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace espalier {

uint64_t ForeignMemoryBytes() {
  uint64_t total_kib = 0, available_kib = 0;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key; meminfo >> key;) {
    if (key == "MemTotal:") meminfo >> total_kib;
    if (key == "MemAvailable:") {
      meminfo >> available_kib;
      break;
    }
    meminfo.ignore(4096, '\n');
  }
  // Pages: size, resident, shared. What is shared is the mapped model: page cache, counted as
  // available.
  uint64_t size = 0, resident = 0, shared = 0;
  std::ifstream("/proc/self/statm") >> size >> resident >> shared;
  const uint64_t used = (total_kib - std::min(total_kib, available_kib)) * 1024;
  const uint64_t own = (resident - std::min(resident, shared)) * sysconf(_SC_PAGESIZE);
  return used - std::min(used, own);
}

}  // namespace espalier
