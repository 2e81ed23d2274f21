#include "kernels/cpu/usable_cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#include "kernels/cgroup.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

std::optional<double> ReadQuota(const CgroupFolder& cgroup) {
  std::string quota;  // microseconds, "max" or -1
  double period = 0;
  if (cgroup.v2) {
    std::ifstream file(cgroup.path + "/cpu.max");
    if (!(file >> quota >> period)) return std::nullopt;
  } else {
    std::ifstream quota_file(cgroup.path + "/cpu.cfs_quota_us");
    std::ifstream period_file(cgroup.path + "/cpu.cfs_period_us");
    if (!(quota_file >> quota) || !(period_file >> period)) return std::nullopt;
  }
  double limit = 0;
  if (!(std::istringstream(quota) >> limit) || limit <= 0 || period <= 0) return std::nullopt;
  return limit / period;
}

int CoresOfAffinity() {
  // The kernel refuses a set smaller than its own, so try larger ones.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(cpus);
    const bool known = sched_getaffinity(0, size, set) == 0;
    const int count = known ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (known) return count;
  }
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

std::optional<double> CgroupCpuQuota(const std::string& root) {
  std::optional<double> least;
  for (const CgroupFolder& cgroup : CgroupFolders(root, "cpu")) {
    const std::optional<double> quota = ReadQuota(cgroup);
    if (quota && (!least || *quota < *least)) least = quota;
  }
  return least;
}

int UsableCores() {
  int cores = std::max(1, CoresOfAffinity());
  if (const std::optional<double> quota = CgroupCpuQuota("")) {
    cores = static_cast<int>(std::clamp(std::ceil(*quota), 1.0, static_cast<double>(cores)));
  }
  return cores;
}

}  // namespace espalier
