// How hard to prune: a pure decision from an instant's pressure and a request's bounds to a rung.
//
// Nothing here reads a clock, holds a lock or draws an unseeded random number, so every decision
// can be replayed from its inputs.
#pragma once

#include <limits>
#include <optional>
#include <string_view>

#include "policy/ladder.h"

namespace espalier {

// What the scheduler and the monitor see at one instant. Fractions are of their limit, so 1 is
// "at the limit" and more is "beyond"; times are seconds.
struct PressureReport {
  double kv_used = 0;        // KV pages held by running sequences / all pages
  double kv_promised = 0;    // KV pages the waiting will need / all pages
  double queue_length = 0;   // waiting requests / queue bound
  double oldest_wait_s = 0;  // age of the oldest waiting request
  int running = 0;           // sequences that hold pages
  int waiting = 0;           // sequences that hold none
};

// What a caller allows. The served rung never goes beyond any of them.
struct PruneBounds {
  double max_prune_ratio = 1.0;                                       // in [0, 1]
  double max_quality_loss = std::numeric_limits<double>::infinity();  // nats per token
  bool never = false;                                                 // rung 0 only
  std::optional<int> rung;  // asked for by number, in place of the policy's choice
};

// True if serving at `rung` keeps what the caller stated.
bool Allows(const PruneBounds& bounds, const Rung& rung);

// `rung`, or the hardest milder one that the bounds allow. What is beyond the ladder is its last.
int HardestAllowed(const PruneBounds& bounds, const Ladder& ladder, int rung);

class Policy {
 public:
  virtual ~Policy() = default;

  // The rung a newcomer is served at: an index into `ladder`, allowed by `bounds`.
  virtual int ChooseRung(const PressureReport& report, const PruneBounds& bounds,
                         const Ladder& ladder) const = 0;
  virtual std::string_view name() const = 0;
};

// Always the same rung, or the hardest milder one that the request's bounds allow.
class FixedPolicy final : public Policy {
 public:
  explicit FixedPolicy(int rung) : rung_(rung) {}
  int ChooseRung(const PressureReport& report, const PruneBounds& bounds,
                 const Ladder& ladder) const override;
  std::string_view name() const override { return "fixed"; }

 private:
  int rung_;
};

}  // namespace espalier
