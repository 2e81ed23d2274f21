#include "policy/ladder.h"

#include <utility>

namespace espalier {

Ladder Ladder::DenseOnly(const SiteWidths& widths, const PriceTag& price) {
  Ladder ladder;
  ladder.rungs_.push_back(Rung{KeepProfile::Dense(widths), KeepProfile::Dense(widths), price});
  return ladder;
}

bool Ladder::Append(Rung rung) {
  if (!rungs_.empty() && (!rung.prefill.NestedIn(rungs_.back().prefill) ||
                          !rung.decode.NestedIn(rungs_.back().decode))) {
    return false;
  }
  rungs_.push_back(std::move(rung));
  return true;
}

}  // namespace espalier
