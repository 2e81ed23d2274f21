// Events per second as a decaying mean, unbiased from the first second on.
#pragma once

#include <algorithm>
#include <cmath>

#include "server/steady_clock.h"

namespace espalier {

class RateMeter {
 public:
  explicit RateMeter(double time_constant_s) : tau_(time_constant_s) {}

  void Add(double events, Instant now) {
    if (start_ == kNever) start_ = last_ = now;
    sum_ = sum_ * Decay(now) + events;
    last_ = now;
  }

  // Events per second at `now`; 0 before the first event.
  double PerSecond(Instant now) const {
    if (start_ == kNever) return 0;
    // The weight of all the time there was; at least 50 ms of it, for the very first events.
    const double seen = std::max(Seconds(now - start_), 0.05);
    return sum_ * Decay(now) / (tau_ * (1 - std::exp(-seen / tau_)));
  }

 private:
  double Decay(Instant now) const { return std::exp(-Seconds(now - last_) / tau_); }

  const double tau_;
  double sum_ = 0;
  Instant start_ = kNever;
  Instant last_ = kNever;
};

}  // namespace espalier
