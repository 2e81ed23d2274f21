// What this machine can do at most, and who else is using it: the yardstick of `espalier bench`.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/cpu/cpu_backend.h"
#include "tools/roofline.h"

namespace espalier {

struct MeasuredCeilings {
  double read_bytes_per_s_1 = 0;  // DRAM, one thread
  MachineCeilings all;            // all threads
  size_t read_footprint = 0;      // bytes read over
};

// Takes about 3 seconds. `footprint` bytes are read over for the DRAM figure, enough to be in no
// cache: 0 takes DramFootprint(). Calls progress(done, total).
MeasuredCeilings MeasureCeilings(Isa isa, int threads, size_t footprint,
                                 const std::function<void(int done, int total)>& progress);

// Twice the last-level cache, at least 256 MiB and at most a quarter of the memory available.
size_t DramFootprint();

// Bytes of the largest cache of the first core; 0 if the system does not tell.
size_t LastLevelCacheBytes();

// "Intel(R) Xeon(R) Processor, 2 cores".
std::string MachineName();

// CPU time of the cores this process may run on, as /proc/stat tells it, in clock ticks.
struct CpuTicks {
  uint64_t busy = 0;
  int cores = 0;
};
// Sums the "cpuN" lines of the cores for which `ours(N)` holds. Idle and waiting for I/O are not
// busy; time stolen by the hypervisor is.
CpuTicks ParseProcStat(std::string_view text, const std::function<bool(int core)>& ours);

// Watches for other processes on our cores.
class CpuWatch {
 public:
  CpuWatch() { Restart(); }
  void Restart();
  // Share of our cores' time that others took since Restart, in [0, 1]. Nothing if /proc/stat is
  // not readable or the stretch is too short to tell (below 0.1 s).
  std::optional<double> OthersShare() const;

 private:
  CpuTicks ticks_;
  double own_seconds_ = 0;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace espalier
