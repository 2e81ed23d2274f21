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

// Of the network in its shield, where the rule has these options: load may cost no more than it did
// in training, beyond which rungs were hardly tried and their values mean nothing.
LevelPolicyOptions LevelOptionsOf(const TrainedFor& trained, const LadderPolicyOptions& rule);

// Where a network is served with other options than it was trained for, which and both values, as
// "--load-loss 0.25, served with 0.2"; else empty. It is worth a warning and no refusal: inputs are
// shares of the targets, and the shield refuses and moves by the options served with.
std::string ServedUnlike(const TrainedFor& trained, const LadderPolicyOptions& rule);

// Where it is looked for: beside a ladder, as LADDER without .ladder, with .dqn.
std::string PolicyPathOf(const std::string& ladder);

}  // namespace espalier
