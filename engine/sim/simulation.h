// A server in virtual time: the shipped engine, scheduler and policy over traffic, with an executor
// that takes as long as a cost model says.
//
// What is left out: the network, tokenising, and the prefix cache, since simulated prompts have no
// text.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/engine.h"
#include "engine/sim/cost_model.h"
#include "engine/sim/traffic.h"
#include "policy/policy.h"

namespace espalier {

struct SimOptions {
  SchedulerOptions scheduler;
  KvGeometry geometry;
  double step_overhead_s = 0;  // of a server's step beyond its executor's
  double ttft_target_s = 1;
  double tpot_target_s = 0.1;
};

// How a call went.
struct SimOutcome {
  bool refused = false;
  double first_token_s = 0;  // after its arrival
  double per_token_s = 0;    // of those after the first, mean
  double loss = 0;           // told, nats per token, mean over its tokens
  int tokens = 0;

  bool Good(const SimOptions& options) const {
    return !refused && first_token_s <= options.ttft_target_s &&
           per_token_s <= options.tpot_target_s;
  }
};

struct SimReport {
  std::vector<SimOutcome> calls;  // of traffic.calls, in their order
  double seconds = 0;             // of virtual time, until the last token
  int64_t steps = 0;
  uint64_t preemptions = 0;
  uint64_t rung_moves = 0;
  std::vector<int64_t> rung_tokens;  // [rungs], drawn

  int refused() const;
  int good(const SimOptions& options) const;
  double loss_per_token() const;  // told, of all tokens drawn
};

// Called for each call that ended or was refused, when it did; for who learns.
using SimObserver = std::function<void(const SimOutcome& outcome)>;

// The ladder and the costs have as many rungs. Crashes on options that an Engine would not take.
SimReport Simulate(const Traffic& traffic, const SimOptions& options, const Ladder& ladder,
                   const CostModel& costs, Policy* policy, const SimObserver& observer = {});

}  // namespace espalier
