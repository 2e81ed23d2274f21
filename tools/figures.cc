#include "tools/figures.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <utility>

#include "tools/commit.h"
#include "tools/machine.h"

namespace espalier {

absl::Status WriteFigures(const std::string& path, nlohmann::ordered_json figures) {
  using Json = nlohmann::ordered_json;
  Json all = {{"machine", MachineName()}, {"commit", kCommit}};
  all.update(figures);
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  std::ofstream file(path);
  file << all.dump(2, ' ', true, Json::error_handler_t::replace) << "\n";
  file.close();
  if (!file) return absl::UnavailableError(fmt::format("cannot write {}", path));
  fmt::print("figures in {}\n", path);
  return absl::OkStatus();
}

}  // namespace espalier
