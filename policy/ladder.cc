#include "policy/ladder.h"

#include <utility>

namespace espalier {

bool Dominated(const PriceTag& a, const PriceTag& b) {
  bool lower = false;
  for (double PriceTag::* const price :
       {&PriceTag::prefill_us_per_token, &PriceTag::decode_us_per_row,
        &PriceTag::kv_bytes_per_token, &PriceTag::quality_loss_nats}) {
    if (b.*price > a.*price) return false;
    lower = lower || b.*price < a.*price;
  }
  return lower;
}

Ladder Ladder::DenseOnly(const SiteWidths& widths, const PriceTag& price) {
  Ladder ladder;
  ladder.rungs_.push_back(Rung{KeepProfile::Dense(widths), KeepProfile::Dense(widths), price});
  return ladder;
}

bool Ladder::Append(Rung rung) {
  if (size() == kMostRungs || !rung.prefill.NestedIn(rungs_.back().prefill) ||
      !rung.decode.NestedIn(rungs_.back().decode) || (rungs_.back().int4_kv && !rung.int4_kv)) {
    return false;
  }
  rungs_.push_back(std::move(rung));
  return true;
}

int Ladder::HardestWithin(double loss) const {
  int rung = 0;
  while (rung + 1 < size() && rungs_[rung + 1].price.quality_loss_nats <= loss) ++rung;
  return rung;
}

}  // namespace espalier
