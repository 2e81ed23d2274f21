#include "engine/machine_memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <string_view>

#include "kernels/cgroup.h"

namespace espalier {
namespace {

// The number in a file of one; none if there is no file, or if it says "max".
std::optional<uint64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  uint64_t number = 0;
  return file >> number ? std::optional(number) : std::nullopt;
}

// The number behind `key` in a file of "key number" lines, whatever follows the number.
std::optional<uint64_t> ReadFact(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key) || line.size() == key.size() || line[key.size()] != ' ') continue;
    return std::strtoull(line.c_str() + key.size(), nullptr, 10);
  }
  return std::nullopt;
}

// "some avg10=1.25 avg60=..": percent of the time.
void NoteStalls(const std::string& path, MachineMemory* memory) {
  constexpr std::string_view kSome = "some avg10=";
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(kSome)) continue;
    const double share = std::strtod(line.c_str() + kSome.size(), nullptr) / 100;
    // Not a NaN either.
    if (share >= 0 && share <= 1) memory->stalled = std::max(share, memory->stalled.value_or(0));
  }
}

void Tighten(const CgroupFolder& cgroup, MachineMemory* memory) {
  const auto file = [&](const char* v1, const char* v2) {
    return cgroup.path + "/memory." + (cgroup.v2 ? v2 : v1);
  };
  std::optional<uint64_t> limit = ReadNumber(file("limit_in_bytes", "max"));
  if (cgroup.v2) {
    NoteStalls(cgroup.path + "/memory.pressure", memory);
    const std::optional<uint64_t> high = ReadNumber(cgroup.path + "/memory.high");
    if (high) limit = std::min(*high, limit.value_or(*high));
  }
  if (!limit) return;
  const uint64_t used = ReadNumber(file("usage_in_bytes", "current")).value_or(0);
  const uint64_t reclaimable =
      ReadFact(cgroup.path + "/memory.stat", cgroup.v2 ? "inactive_file" : "total_inactive_file")
          .value_or(0);
  const uint64_t held = used - std::min(used, reclaimable);
  memory->total = std::min(memory->total, *limit);
  memory->available = std::min(memory->available, *limit - std::min(*limit, held));
}

}  // namespace

MachineMemory ReadMachineMemory(const std::string& root) {
  const uint64_t page = sysconf(_SC_PAGESIZE);
  const std::string meminfo = root + "/proc/meminfo";
  const auto bytes = [&](const char* key, int otherwise_pages) {
    const std::optional<uint64_t> kib = ReadFact(meminfo, key);
    return kib ? *kib * 1024 : static_cast<uint64_t>(sysconf(otherwise_pages)) * page;
  };
  MachineMemory memory{.total = bytes("MemTotal:", _SC_PHYS_PAGES),
                       .available = bytes("MemAvailable:", _SC_AVPHYS_PAGES)};
  NoteStalls(root + "/proc/pressure/memory", &memory);
  for (const CgroupFolder& cgroup : CgroupFolders(root, "memory")) Tighten(cgroup, &memory);
  return memory;
}

uint64_t ResidentMemoryBytes(const std::string& root) {
  uint64_t size = 0, resident = 0, shared = 0;  // pages
  std::ifstream(root + "/proc/self/statm") >> size >> resident >> shared;
  return (resident - std::min(resident, shared)) * sysconf(_SC_PAGESIZE);
}

uint64_t ForeignMemoryBytes(const std::string& root) {
  const MachineMemory memory = ReadMachineMemory(root);
  // What is shared is the mapped model: page cache, counted as available.
  const uint64_t used = memory.total - std::min(memory.total, memory.available);
  return used - std::min(used, ResidentMemoryBytes(root));
}

}  // namespace espalier
