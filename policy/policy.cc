#include "policy/policy.h"

#include <algorithm>
#include <bit>

namespace espalier {

bool Allows(const PruneBounds& bounds, const Rung& rung) {
  if (bounds.never) return rung.prefill.dense() && rung.decode.dense() && !rung.int4_kv;
  const double ratio = std::max(rung.prefill.prune_ratio(), rung.decode.prune_ratio());
  // A bound below zero, or NaN, asks for no less than rung 0 gives: zero.
  const double most = std::max(0.0, bounds.max_prune_ratio);
  if (rung.int4_kv && most == 0) return false;  // who wants nothing left out wants no bits left out
  // As the wire has both: a rung's told loss, given back as a bound, allows that rung.
  const auto loss = static_cast<float>(rung.price.quality_loss_nats);
  return ratio <= most && loss <= static_cast<float>(std::max(0.0, bounds.max_quality_loss));
}

RungSet AllowedRungs(const PruneBounds& bounds, const Ladder& ladder) {
  RungSet allowed = 0;
  for (int rung = 0; rung < ladder.size(); ++rung) {
    allowed |= RungSet{Allows(bounds, ladder.rung(rung))} << rung;
  }
  return allowed;
}

int HardestIn(RungSet set, int rung) {
  return std::bit_width(set & UpTo(std::clamp(rung, 0, kMostRungs - 1))) - 1;
}

int RungAtLevel(const RequestTraits& traits, int level, int hardest) {
  if (level == 0) return 0;
  const int64_t rung = int64_t{level} - traits.priority;
  return HardestIn(traits.allowed, static_cast<int>(std::clamp<int64_t>(rung, 0, hardest)));
}

}  // namespace espalier
