// A policy that may serve no harder than a cap which others move: the seat of a circuit breaker.
#pragma once

#include <algorithm>
#include <span>
#include <string_view>

#include "policy/policy.h"

namespace espalier {

class CappedPolicy final : public Policy {
 public:
  // `policy` must outlive it. No cap at first.
  explicit CappedPolicy(Policy* policy) : policy_(policy) {}

  // From now on rungs beyond `hardest` >= 0 are served to those alone who ask for them by number.
  void set_hardest(int hardest) { hardest_ = hardest; }

  void Observe(const PressureReport& report, const Ladder& ladder) override {
    policy_->Observe(report, ladder);
  }
  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, std::min(hardest_, policy_->ChooseRung(traits)));
  }
  std::string_view name() const override { return policy_->name(); }
  std::string_view reason() const override {
    return policy_->wanted() > hardest_ ? "quality" : policy_->reason();
  }
  int hardest_open() const override { return std::min(hardest_, policy_->hardest_open()); }
  std::span<const float> scores() const override { return policy_->scores(); }
  void Chose(uint64_t request, const RequestTraits& traits, int rung) override {
    policy_->Chose(request, traits, rung);
  }
  double refuses_behind_s() const override { return policy_->refuses_behind_s(); }

 private:
  Policy* const policy_;
  int hardest_ = kMostRungs;
};

}  // namespace espalier
