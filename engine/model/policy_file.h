// A learned policy's file: what `espalier train --task serve` wrote, checked against a ladder.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "policy/training/q_network.h"

namespace espalier {

struct PolicyFile {
  QNetwork network;
  std::string of;       // what it was trained for, a line
  std::string version;  // of its bytes, hexadecimal
};

// For a ladder of `rungs` rungs. Errors name the path: NotFound, or InvalidArgument for what is no
// such network, was changed or cut, or is of another ladder.
absl::StatusOr<PolicyFile> OpenPolicy(const std::string& path, int rungs);

// Where it is looked for: beside a ladder, as LADDER without .ladder, with .dqn.
std::string PolicyPathOf(const std::string& ladder);

}  // namespace espalier
