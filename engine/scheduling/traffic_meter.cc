#include "engine/scheduling/traffic_meter.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

namespace espalier {
namespace {

double Seconds(Instant since, Instant now) {
  return std::chrono::duration<double>(now - since).count();
}

void Mean(double share_of_new, double value, double* mean) {
  *mean = (1 - share_of_new) * *mean + share_of_new * value;
}

}  // namespace

void TrafficMeter::Rest() {
  first_tokens_.clear();
  first_token_s_ = 0;
  last_step_ = kNever;
  step_s_ = 0;  // and not the first one, which prefills: that alone is no reason to prune
}

void TrafficMeter::Step(Instant now) {
  if (last_step_ != kNever) Mean(0.1, Seconds(last_step_, now), &step_s_);
  last_step_ = now;

  constexpr double kMeanSeconds = 2;
  const double since_s = std::max(1e-6, arrivals_at_ == kNever ? 0 : Seconds(arrivals_at_, now));
  // As if they had come evenly since the last step, which may be long ago.
  Mean(-std::expm1(-since_s / kMeanSeconds), std::exchange(arrived_, 0) / since_s,
       &arrivals_per_s_);
  arrivals_at_ = now;

  for (const Instant arrival : first_tokens_) Mean(0.2, Seconds(arrival, now), &first_token_s_);
  first_tokens_.clear();
}

}  // namespace espalier
