// The shield around a learned policy: what it must not get wrong is not left to it.
#pragma once

#include <span>
#include <string_view>

#include "policy/ladder_policy.h"
#include "policy/policy.h"

namespace espalier {

// Serves at the level that `policy` wants, but
// - at the rule's, where a report is not finite, is older than the last one, knows memory by what
//   it was some seconds ago, or the policy wants a rung that is not there;
// - no milder than the rule's while running sequences hold more KV than there may be, or where the
//   rule refuses newcomers; and no harder than load may cost unless the rule is, for memory;
// - at the full model in calm, where the rule's level would fall: what may come later is no reason
//   to serve worse now;
// - a level falls by one rung a dwell, as the rule's does, however fast pressure goes; of a time
//   without reports, an idle one, all dwells count;
// - newcomers are refused wherever the rule would refuse them, which a policy that stays below the
//   highest level cannot put off: it would only let them queue; and at the highest level that what
//   presses may raise it to, while the oldest waits for long, though the rule be on its way there.
class Shield final : public Policy {
 public:
  // `policy` must outlive the shield.
  Shield(Policy* policy, const LadderPolicyOptions& rule)
      : policy_(policy), options_(rule), rule_(rule) {}

  void Observe(const PressureReport& report, const Ladder& ladder) override;
  int ChooseRung(const RequestTraits& traits) const override {
    return RungAtLevel(traits, level_, most_);
  }
  std::string_view name() const override { return policy_->name(); }
  // The policy's own while it is followed, else the rule's.
  std::string_view reason() const override { return level_ == 0 ? "none" : reason_; }
  double refuses_behind_s() const override {
    return refuses_ ? options_.refuses_behind_s() : kNobody;
  }
  bool refuses() const { return refuses_; }
  int hardest_open() const override { return most_; }
  std::span<const float> scores() const override { return policy_->scores(); }

 private:
  Policy* const policy_;
  const LadderPolicyOptions options_;
  LadderPolicy rule_;
  int level_ = 0;
  int most_ = 0;  // that requests of low priority may be served at
  double time_s_ = 0;
  double changed_s_ = 0;
  std::string_view reason_ = "none";
  bool refuses_ = false;
};

}  // namespace espalier
