// `espalier bench --fit`: what steps of any composition take here, as a formula for the simulator.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "tools/local_model.h"

namespace espalier {

struct CostFitOptions {
  LocalModelOptions model;
  std::string ladder;  // empty: the dense model alone
  int step_rows = 128;
  uint64_t seed = 1;
  std::string out;  // CostModel as text
  std::string figures;
};

absl::Status FitStepCosts(const CostFitOptions& options);

}  // namespace espalier
