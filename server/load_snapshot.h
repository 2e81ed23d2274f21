// What routers, metrics and people may know about the server's load at one instant.
#pragma once

#include <cstdint>

#include "engine/engine.h"
#include "engine/ledger.h"
#include "engine/scheduling/scheduler.h"

namespace espalier {

// Published by the engine thread after each step; read without touching the scheduler.
struct LoadSnapshot {
  SchedulerStats stats;  // of the last step
  WeightsReport weights;
  Ledger ledger;        // `foreign` is filled by who reads the machine, not by the engine thread
  int arriving = 0;     // admitted, but in no step so far: they wait too
  int max_waiting = 0;  // bound on waiting + arriving
  uint64_t steps = 0;   // since start
  double generated_tokens_per_second = 0;  // decaying means, time constant 5 s
  double finished_per_second = 0;          // requests ended, for whatever reason
  bool draining = false;

  int waiting() const { return stats.waiting + arriving; }
  // Pages in use / all pages, in [0, 1].
  double kv_utilization() const {
    return stats.pages_total > 0 ? double(stats.pages_used) / stats.pages_total : 0;
  }
};

}  // namespace espalier
