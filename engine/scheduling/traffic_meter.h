// How the traffic goes: means of the last steps, first tokens and arrivals, for the pressure
// report.
#pragma once

#include <vector>

#include "engine/scheduling/request.h"

namespace espalier {

class TrafficMeter {
 public:
  // Room for as many first tokens of one step.
  explicit TrafficMeter(int most_first_tokens) { first_tokens_.reserve(most_first_tokens); }

  // Nobody was there: what steps and first tokens took before says nothing of who comes now.
  void Rest();
  // So many came since this was last told.
  void CountArrivals(int requests) { arrived_ += requests; }
  // In this step somebody who arrived then drew the first token.
  void CountFirstToken(Instant arrival) { first_tokens_.push_back(arrival); }
  // A step begins, and the one before has ended.
  void Step(Instant now);

  // Seconds, from 0 after a Rest.
  double step_s() const { return step_s_; }
  double first_token_s() const { return first_token_s_; }  // from the arrival
  double arrivals_per_s() const { return arrivals_per_s_; }

 private:
  Instant last_step_ = kNever;  // kNever: none since the Rest
  double step_s_ = 0;
  std::vector<Instant> first_tokens_;  // arrivals of who drew one in the last step
  double first_token_s_ = 0;
  int arrived_ = 0;               // since the last Step
  Instant arrivals_at_ = kNever;  // kNever: none so far
  double arrivals_per_s_ = 0;     // as of arrivals_at_
};

}  // namespace espalier
