// A policy that may serve no harder than a cap which others move: the seat of a circuit breaker.
#pragma once

#include <algorithm>
#include <string_view>

#include "policy/policy.h"

namespace espalier {

class CappedPolicy final : public ForwardingPolicy {
 public:
  // No cap at first.
  using ForwardingPolicy::ForwardingPolicy;

  // From now on rungs beyond `hardest` >= 0 are served to those alone who ask for them by number,
  // and to who runs, and has no K and V for a milder one.
  void set_hardest(int hardest) { hardest_ = hardest; }

  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, std::min(hardest_, policy().ChooseRung(traits)));
  }
  std::string_view reason() const override {
    return policy().wanted() > hardest_ ? "quality" : policy().reason();
  }
  int hardest_open() const override { return std::min(hardest_, policy().hardest_open()); }
  int hardest_served() const override { return std::min(hardest_, policy().hardest_served()); }
  int wanted() const override { return std::min(hardest_, policy().wanted()); }

 private:
  int hardest_ = kMostRungs - 1;
};

}  // namespace espalier
