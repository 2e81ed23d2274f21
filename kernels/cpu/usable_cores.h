// How many cores a cgroup lets this process use.
#pragma once

#include <optional>
#include <string>

namespace espalier {

// The smallest CPU quota, in cores, of the process's cgroup and its ancestors, v1
// (cpu.cfs_quota_us) and v2 (cpu.max); none if unlimited or unreadable. `root` is put before /proc
// and /sys paths.
std::optional<double> CgroupCpuQuota(const std::string& root);

}  // namespace espalier
