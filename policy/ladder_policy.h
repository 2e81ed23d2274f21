// The rule policy: one level for all, a rung of the ladder, which rises while something is short
// and falls, a rung a dwell, once nothing is.
#pragma once

#include <string_view>

#include "policy/policy.h"

namespace espalier {

// Where a signal makes the level rise, and what it must have fallen to before the level does; what
// lies between holds it.
struct PressureBand {
  double raise = 0;
  double lower = 0;
};

struct LadderPolicyOptions {
  double ttft_target_s = 1;    // a request should not wait for longer
  double tpot_target_s = 0.1;  // nor a step take longer, which is who decodes' time per token
  // Of kv_used, for the level to fall; it rises above 1. That somebody waits for pages is no reason
  // by itself: a short wait costs less than a rung.
  double kv_lower = 0.9;
  // What waiting and slow steps alone may cost, told nats per token: they raise the level to
  // Ladder::HardestWithin at most. Memory may go to the last rung. policy/README.md tells why 0.2.
  double load_loss = 0.2;
  // Of the oldest wait and of a step, as shares of their targets. Who is behind the oldest waits
  // for longer than it: at half of the target too many are lost already (policy/README.md).
  PressureBand wait = {.raise = 0.25, .lower = 0.1};
  PressureBand step = {.raise = 1.0, .lower = 0.75};
  double raise_dwell_s = 0.2;   // between a change of the level and the next rise
  double lower_dwell_s = 0.25;  // for which all signals must have been low before it falls by one

  double refuses_behind_s() const { return wait.raise * ttft_target_s; }
};

// Rises by one rung a dwell, as far as load may cost; at once, to the next rung of less KV and
// beyond that, where running sequences hold more pages than there may be. What memory asked for
// beyond goes by a rung a dwell once memory asks for it no more, however long requests wait.
// Requests of a higher priority than 0 are served so many rungs milder than the level, those of a
// lower one so many harder, within the same limits. Where the level is as high as what
// presses may raise it and the oldest wait is long, newcomers are refused who would be served after
// somebody that has waited so: they would come too late. Of a report that says nothing (NaN) the
// level stays as it is.
class LadderPolicy final : public Policy {
 public:
  explicit LadderPolicy(const LadderPolicyOptions& options) : options_(options) {}

  void Observe(const PressureReport& report, const Ladder& ladder) override;
  int ChooseRung(const RequestTraits& traits) const override {
    return RungAtLevel(traits, level_, most_);
  }
  std::string_view name() const override { return "ladder"; }
  // "memory", "queue" or "latency", for which the level rose last; "none" at level 0.
  std::string_view reason() const override { return level_ == 0 ? "none" : reason_; }
  double refuses_behind_s() const override {
    return refuses_ ? options_.refuses_behind_s() : kNobody;
  }

  int hardest_open() const override { return most_; }

  int level() const { return level_; }
  bool refuses() const { return refuses_; }
  // All signals have been low for as long as the level needs to fall by a rung.
  bool calm() const { return calm_; }

 private:
  LadderPolicyOptions options_;
  int level_ = 0;
  int most_ = 0;          // that requests of low priority may be served at
  int load_hardest_ = 0;  // that load may raise the level to
  double changed_s_ = 0;
  double low_since_s_ = 0;     // since all signals are low
  double kv_low_since_s_ = 0;  // since memory does not ask for the level
  std::string_view reason_ = "none";
  bool refuses_ = false;
  bool calm_ = true;
};

}  // namespace espalier
