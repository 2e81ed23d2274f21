// `espalier train --task serve`: a level policy learned in the simulator, and whether it is better
// than the rule.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "tools/simulated_server.h"

namespace espalier {

struct TrainServingOptions {
  SimulatedServerOptions server;
  int episodes = 1200;  // simulations of a minute
  int traces = 100;     // held out, to compare on
  // What a nat per token of told loss is worth, as a share of a good call: at 0.5, a call within
  // its targets at 0.3 nats is worth 0.85.
  double loss_weight = 0.5;
  double refusal_cost = 0.25;  // in good calls
  uint64_t seed = 1;
  std::string out;
  std::string figures;
};

absl::Status TrainServing(const TrainServingOptions& options);

}  // namespace espalier
