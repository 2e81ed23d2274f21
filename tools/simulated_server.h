// What `simulate` and `train --task serve` simulate: a ladder, its costs and a server's options.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/sim/simulation.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"

namespace CLI {
class App;
}

namespace espalier {

struct SimulatedServerOptions {
  std::string ladder;
  std::string costs;
  double kv_mib = 64;
  int max_sequences = 64;
  int max_batch_tokens = 128;
  int max_waiting = 256;
  double overhead_ms = 0.3;  // of a server's step beyond the engine's
  double ttft_target = 1;
  double tpot_target = 0.1;
  double load_loss = LadderPolicyOptions{}.load_loss;  // nats per token
};

// Of the rule, and of what is learned, for such a server.
LadderPolicyOptions RuleOf(const SimulatedServerOptions& options);
LevelPolicyOptions LevelOf(const SimulatedServerOptions& options);

// --ladder, --costs, --kv-memory and so on.
void AddSimulatedServerOptions(CLI::App& sub, SimulatedServerOptions* options);

struct SimulatedServer {
  Ladder ladder = Ladder::DenseOnly({});
  CostModel costs;
  SimOptions options;
};

// Errors name the file and the line.
absl::StatusOr<SimulatedServer> MakeSimulatedServer(const SimulatedServerOptions& options);

}  // namespace espalier
