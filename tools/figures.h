// A benchmark's figures as a file: flat keys to numbers, with the machine and the commit.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "absl/status/status.h"

namespace espalier {

// Puts machine and commit before `figures`, makes the folder if it is not there, and says where
// they are. Errors name the path.
absl::Status WriteFigures(const std::string& path, nlohmann::ordered_json figures);

}  // namespace espalier
