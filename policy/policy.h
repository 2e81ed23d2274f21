// How hard to prune: a pure decision from an instant's pressure and a request's bounds to a rung.
//
// Nothing here reads a clock, holds a lock or draws an unseeded random number, so every decision
// can be replayed from its inputs.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string_view>

#include "policy/ladder.h"

namespace espalier {

// What the scheduler and the monitor see at one instant. Fractions are of their limit, so 1 is
// "at the limit" and more is "beyond"; times are seconds.
struct PressureReport {
  double time_s = 0;         // of this report, since an epoch of the driver's; never falls
  double kv_used = 0;        // KV pages held by running sequences / pages there may be
  double kv_promised = 0;    // that the waiting may need, newcomers as of rung 0 / there may be
  double queue_length = 0;   // waiting requests / queue bound
  double oldest_wait_s = 0;  // the longest, since arrival or, of the preempted, since then
  double step_s = 0;         // mean of the last steps, from 0 after a pause: a decode row's time
  // Since the machine's memory was last seen, which limits the pages there may be; grows while its
  // sources are missing. 0 where none are asked.
  double memory_age_s = 0;
  double free_memory = 1;     // of what the process may hold, by budget and machine: not held yet
  double foreign_memory = 0;  // of the machine's: held by others
  double first_token_s = 0;   // from arrival to first token, mean of the last, from 0 after a pause
  double arrivals_per_s = 0;  // those refused, too; mean of some two seconds
  int running = 0;            // sequences that hold pages
  int waiting = 0;            // sequences that hold none
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

// Rungs of a ladder, one bit each.
using RungSet = uint64_t;
static_assert(kMostRungs <= 64);

constexpr bool Has(RungSet set, int rung) { return (set >> rung & 1) != 0; }
// Rungs 0 to `hardest`, of [0, kMostRungs).
constexpr RungSet UpTo(int hardest) { return ~RungSet{0} >> (63 - hardest); }

// Those that the bounds allow, without regard to `bounds.rung`; rung 0 is always one of them.
RungSet AllowedRungs(const PruneBounds& bounds, const Ladder& ladder);

// `rung`, or the hardest milder one in the set, which has rung 0.
int HardestIn(RungSet set, int rung);

// What of a request decides.
struct RequestTraits {
  RungSet allowed = 1;
  int priority = 0;  // higher is served first, and pruned last
};

// The rung of a request while all are to be served at `level` of a ladder whose last rung is
// `hardest`: so many rungs milder as its priority is above 0, or harder as it is below.
int RungAtLevel(const RequestTraits& traits, int level, int hardest);

class Policy {
 public:
  virtual ~Policy() = default;

  // Before each step: what choices go by until the next.
  virtual void Observe(const PressureReport& /*report*/, const Ladder& /*ladder*/) {}

  // The rung to serve at from now on, one of those allowed. Asked for newcomers and, in each step,
  // for who runs.
  virtual int ChooseRung(const RequestTraits& traits) const = 0;
  virtual std::string_view name() const = 0;
  // Why choices are as they are, in a word; empty: they are always the same. Lasts as long as the
  // program.
  virtual std::string_view reason() const { return ""; }
  // Newcomers should be refused who would be served after somebody who has waited for so long,
  // seconds.
  virtual double refuses_behind_s() const { return kNobody; }
  static constexpr double kNobody = std::numeric_limits<double>::infinity();
  // The hardest rung that what presses may raise requests to now.
  virtual int hardest_open() const { return kMostRungs - 1; }
  // Beyond this rung nobody is served who did not name one, even where it would fit into memory at
  // no other: it waits, or is refused.
  virtual int hardest_served() const { return kMostRungs - 1; }
  // Of what was learned: what each open rung is thought to be worth, [rungs], as of its last
  // decision. Empty: it weighs none.
  virtual std::span<const float> scores() const { return {}; }
  // Told of a request that is admitted or moves, unless it named its rung: to ChooseRung's, or to
  // another where weights or pages forbid that.
  virtual void Chose(uint64_t /*request*/, const RequestTraits& /*traits*/, int /*rung*/) {}
  // The rung that it would serve a request without bounds at.
  virtual int wanted() const { return ChooseRung({.allowed = ~RungSet{0}}); }
};

// Always the same rung, or the hardest milder one that the request's bounds allow.
class FixedPolicy final : public Policy {
 public:
  explicit FixedPolicy(int rung) : rung_(rung) {}
  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, rung_);
  }
  std::string_view name() const override { return "fixed"; }
  int hardest_served() const override { return rung_; }

 private:
  int rung_;
};

// Says what another policy says, for those that change some of it: who changes ChooseRung changes
// `wanted`, too.
class ForwardingPolicy : public Policy {
 public:
  // `policy` must outlive it.
  explicit ForwardingPolicy(Policy* policy) : policy_(policy) {}

  void Observe(const PressureReport& report, const Ladder& ladder) override {
    policy_->Observe(report, ladder);
  }
  int ChooseRung(const RequestTraits& traits) const override { return policy_->ChooseRung(traits); }
  std::string_view name() const override { return policy_->name(); }
  std::string_view reason() const override { return policy_->reason(); }
  double refuses_behind_s() const override { return policy_->refuses_behind_s(); }
  int hardest_open() const override { return policy_->hardest_open(); }
  int hardest_served() const override { return policy_->hardest_served(); }
  std::span<const float> scores() const override { return policy_->scores(); }
  void Chose(uint64_t request, const RequestTraits& traits, int rung) override {
    policy_->Chose(request, traits, rung);
  }
  int wanted() const override { return policy_->wanted(); }

 protected:
  const Policy& policy() const { return *policy_; }

 private:
  Policy* const policy_;
};

// Lets another policy look and serves the full model: what it would have done is seen, not felt.
class ShadowPolicy final : public ForwardingPolicy {
 public:
  using ForwardingPolicy::ForwardingPolicy;
  int ChooseRung(const RequestTraits& /*traits*/) const override { return 0; }
  std::string_view name() const override { return "shadow"; }
  double refuses_behind_s() const override { return kNobody; }
  int hardest_served() const override { return 0; }
};

}  // namespace espalier
