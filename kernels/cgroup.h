// Where the kernel tells what this process's cgroups may use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace espalier {

struct CgroupFolder {
  std::string path;
  bool v2 = false;  // says how its files are named
};

// The folders of the process's cgroup and its visible ancestors in the hierarchies that
// `controller`
// ("cpu", "memory") may act in: v1's own for it, and v2's. Empty if unreadable; a folder may lack
// the controller's files. `root` is put before /proc and /sys paths.
std::vector<CgroupFolder> CgroupFolders(const std::string& root, std::string_view controller);

}  // namespace espalier
