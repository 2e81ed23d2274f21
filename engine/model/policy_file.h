// A learned policy's file: what `espalier train --task serve` wrote, checked against a ladder.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/training/q_network.h"

namespace espalier {

struct PolicyFile {
  QNetwork network;
  TrainedFor trained;
  std::string version;  // of its bytes, hexadecimal
};

// For a ladder of `rungs` rungs. Errors name the path: NotFound, or InvalidArgument for what is no
// such network, was changed or cut, or is of another ladder.
absl::StatusOr<PolicyFile> OpenPolicy(const std::string& path, int rungs);

// Of the network in its shield, where the rule has these options. Load may cost no more than it did
// in training, beyond which rungs were hardly tried and their values mean nothing; so another
// load loss is worth a warning and no refusal: the shield refuses and moves by the rule's. Other
// targets are not even that, since the network sees shares of them.
LevelPolicyOptions LevelOptionsOf(const TrainedFor& trained, const LadderPolicyOptions& rule);

// Where it is looked for: beside a ladder, as LADDER without .ladder, with .dqn.
std::string PolicyPathOf(const std::string& ladder);

}  // namespace espalier
