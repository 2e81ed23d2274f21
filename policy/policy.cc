#include "policy/policy.h"

#include <algorithm>

namespace espalier {

bool Allows(const PruneBounds& bounds, const Rung& rung) {
  if (bounds.never) return rung.prefill.dense() && rung.decode.dense();
  const double ratio = std::max(rung.prefill.prune_ratio(), rung.decode.prune_ratio());
  // A bound below zero, or NaN, asks for no less than rung 0 gives: zero.
  return ratio <= std::max(0.0, bounds.max_prune_ratio) &&
         rung.price.quality_loss_nats <= std::max(0.0, bounds.max_quality_loss);
}

int HardestAllowed(const PruneBounds& bounds, const Ladder& ladder, int rung) {
  // Rung 0 is dense and loses nothing, so the walk down always ends at an allowed rung.
  rung = std::clamp(rung, 0, ladder.size() - 1);
  while (rung > 0 && !Allows(bounds, ladder.rung(rung))) --rung;
  return rung;
}

int FixedPolicy::ChooseRung(const PressureReport&, const PruneBounds& bounds,
                            const Ladder& ladder) const {
  return HardestAllowed(bounds, ladder, rung_);
}

}  // namespace espalier
