// How long a step took, and how long it let requests wait.
#pragma once

#include <span>

namespace espalier {

// Seconds.
struct StepTimes {
  double step = 0;         // wall time
  double oldest_wait = 0;  // age of the oldest request that still waits; 0: none does
  std::span<const double>
      token_gaps;  // from a request's token to its next, where this step drew one
};

}  // namespace espalier
