#include "engine/model/files/file_error.h"

#include <fmt/format.h>

namespace espalier {

std::string Quoted(std::string_view text) {
  constexpr size_t kShown = 80;
  return fmt::format("{:?}{}", text.substr(0, kShown), text.size() > kShown ? "..." : "");
}

absl::Status Mismatch(std::string_view path, std::string_view where, std::string_view expected,
                      std::string_view got) {
  return absl::InvalidArgumentError(
      fmt::format("{}: {}: expected {}, got {}", path, where, expected, got));
}

absl::Status Unsupported(std::string_view path, std::string_view where, std::string_view what,
                         std::string_view supported) {
  return absl::UnimplementedError(
      fmt::format("{}: {}: {} is not supported, only {}", path, where, what, supported));
}

}  // namespace espalier
