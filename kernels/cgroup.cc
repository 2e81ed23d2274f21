#include "kernels/cgroup.h"

#include <fstream>
#include <sstream>

namespace espalier {
namespace {

// Where a hierarchy is mounted and where in it this process lives.
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
std::vector<Hierarchy> Memberships(const std::string& root, std::string_view controller) {
  std::vector<Hierarchy> found;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = line.substr(0, first) == "0" && controllers.empty();
    if (v2 || Lists(controllers, controller)) {
      found.push_back({.v2 = v2, .path = line.substr(second + 1)});
    }
  }
  return found;
}

// /proc/self/mountinfo: "id parent dev ROOT MOUNT_POINT options [tags] - TYPE source
// SUPER_OPTIONS".
bool FindMount(const std::string& root, std::string_view controller, Hierarchy* hierarchy) {
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string skip, mounted_root, mount_point, type, super_options;
    words >> skip >> skip >> skip >> mounted_root >> mount_point;
    while (words >> skip && skip != "-") {
    }
    words >> type >> skip >> super_options;
    if (hierarchy->v2 ? type == "cgroup2" : type == "cgroup" && Lists(super_options, controller)) {
      hierarchy->mounted_root = mounted_root == "/" ? "" : mounted_root;
      hierarchy->mount_point = root + mount_point;
      return true;
    }
  }
  return false;
}

}  // namespace

std::vector<CgroupFolder> CgroupFolders(const std::string& root, std::string_view controller) {
  std::vector<CgroupFolder> folders;
  for (Hierarchy& hierarchy : Memberships(root, controller)) {
    if (!FindMount(root, controller, &hierarchy)) continue;
    // In a container only a part of the hierarchy may be mounted.
    std::string path = hierarchy.path;
    const size_t root_size = hierarchy.mounted_root.size();
    if (path.starts_with(hierarchy.mounted_root) &&
        (path.size() == root_size || path[root_size] == '/')) {
      path.erase(0, root_size);
    }
    while (true) {
      folders.push_back({.path = hierarchy.mount_point + path, .v2 = hierarchy.v2});
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos) break;
      path.erase(slash);
    }
  }
  return folders;
}

}  // namespace espalier
