// How long a step took, and how long it let requests wait.
#pragma once

#include <span>

namespace espalier {

// Seconds.
struct StepTimes {
  double step = 0;         // wall time
  double oldest_wait = 0;  // PressureReport's; 0: nobody waits
  std::span<const double>
      token_gaps;  // from a request's token to its next, where this step drew one
};

}  // namespace espalier
