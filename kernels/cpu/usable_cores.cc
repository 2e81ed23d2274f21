#include "kernels/cpu/usable_cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

// Where a hierarchy that limits CPU time is mounted and where in it this process lives.
struct Hierarchy {
  bool v2 = false;
  std::string mount_point;
  std::string mounted_root;  // the part of the hierarchy seen at mount_point
  std::string path;
};

bool Lists(const std::string& comma_separated, std::string_view word) {
  std::istringstream words(comma_separated);
  for (std::string each; std::getline(words, each, ',');) {
    if (each == word) return true;
  }
  return false;
}

// /proc/self/cgroup: "4:cpu,cpuacct:/path", or "0::/path" for v2.
std::vector<Hierarchy> Memberships(const std::string& root) {
  std::vector<Hierarchy> found;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = line.substr(0, first) == "0" && controllers.empty();
    if (v2 || Lists(controllers, "cpu")) {
      found.push_back({.v2 = v2, .path = line.substr(second + 1)});
    }
  }
  return found;
}

// /proc/self/mountinfo: "id parent dev ROOT MOUNT_POINT options [tags] - TYPE source
// SUPER_OPTIONS".
bool FindMount(const std::string& root, Hierarchy* hierarchy) {
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string skip, mounted_root, mount_point, type, super_options;
    words >> skip >> skip >> skip >> mounted_root >> mount_point;
    while (words >> skip && skip != "-") {
    }
    words >> type >> skip >> super_options;
    if (hierarchy->v2 ? type == "cgroup2" : type == "cgroup" && Lists(super_options, "cpu")) {
      hierarchy->mounted_root = mounted_root == "/" ? "" : mounted_root;
      hierarchy->mount_point = root + mount_point;
      return true;
    }
  }
  return false;
}

std::optional<double> ReadQuota(const Hierarchy& hierarchy, const std::string& folder) {
  std::string quota;  // microseconds, "max" or -1
  double period = 0;
  if (hierarchy.v2) {
    std::ifstream file(folder + "/cpu.max");
    if (!(file >> quota >> period)) return std::nullopt;
  } else {
    std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
    std::ifstream period_file(folder + "/cpu.cfs_period_us");
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
  for (Hierarchy& hierarchy : Memberships(root)) {
    if (!FindMount(root, &hierarchy)) continue;
    // In a container only a part of the hierarchy may be mounted.
    std::string path = hierarchy.path;
    if (path.starts_with(hierarchy.mounted_root)) path.erase(0, hierarchy.mounted_root.size());
    while (true) {
      const std::optional<double> quota = ReadQuota(hierarchy, hierarchy.mount_point + path);
      if (quota && (!least || *quota < *least)) least = quota;
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos) break;
      path.erase(slash);
    }
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
