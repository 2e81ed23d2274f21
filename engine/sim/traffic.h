// What comes to a simulated server: calls, and memory that others take and give back. Seeded: the
// same options, the same traffic, on any machine.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/scheduling/request.h"
#include "policy/blocks/block_agent.h"

namespace espalier {

struct SimCall {
  Instant arrival{0};
  int prompt = 1;  // tokens
  int output = 1;  // tokens, all of them drawn
  int priority = 0;

  bool operator==(const SimCall&) const = default;
};

// From `at` on, the KV pool is `share` of what it was made as.
struct MemoryShock {
  Instant at{0};
  double share = 1;

  bool operator==(const MemoryShock&) const = default;
};

struct Traffic {
  std::vector<SimCall> calls;       // by arrival
  std::vector<MemoryShock> shocks;  // by time
};

enum class Arrivals : uint8_t {
  kPoisson,
  kBursts,   // on for `period` / 4 at 3 times the rate, off for the rest at a third of it
  kDiurnal,  // the rate swings by 80 % around its mean, once a `period`
};
inline constexpr std::string_view kArrivalNames[] = {"poisson", "bursts", "diurnal"};

// Tokens, lognormal: the median and the standard deviation of the logarithm, cut off at `most`.
struct Lengths {
  double median = 128;
  double spread = 0;
  int most = 4096;
};

struct TrafficOptions {
  Arrivals arrivals = Arrivals::kPoisson;
  double rate = 1;       // calls a second, in the mean
  double seconds = 60;   // in which calls arrive
  double period_s = 20;  // of bursts and days
  Lengths prompt, output;
  double low_priority = 0;  // share of calls of priority -1
  // Shocks come at exponential gaps of this mean, each takes a share drawn uniformly from
  // [0, most_taken] and lasts for as long as the gap to the next. 0: none.
  double shock_every_s = 0;
  double most_taken = 0.7;
  uint64_t seed = 1;
};

Traffic MakeTraffic(const TrafficOptions& options);

// A batch of RAP's memory sweeps (RapScenarios), once in each of these shares of the KV pool, the
// published budgets: as many calls at once, each of `length` tokens, of which a quarter are drawn.
inline constexpr double kRapBudgets[] = {1, 0.8, 0.6};
Traffic RapTraffic(const BlockTask& scenario, double gap_s);

// Lines "call SECONDS PROMPT OUTPUT [PRIORITY]" and "memory SECONDS SHARE", in any order, comments
// with #. False, with the line and what is wrong with it in *error.
bool ParseTraffic(std::string_view text, Traffic* traffic, std::string* error);

}  // namespace espalier
