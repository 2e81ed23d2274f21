// The pruning ladder: a short ordered list of rungs, rung 0 dense, each nested in the one before.
#pragma once

#include <string>
#include <vector>

#include "policy/keep_profile.h"

namespace espalier {

// What a rung costs and what it loses, measured by calibration. Rung 0 loses nothing.
struct PriceTag {
  double prefill_us_per_token = 0;  // time of one prefill row, microseconds
  double decode_us_per_row = 0;     // time of one decode row, microseconds
  double kv_bytes_per_token = 0;    // over all layers that keep attention
  double quality_loss_nats = 0;     // expected loss above dense, nats per token
};

// Whether what costs `a` is never to be chosen over what costs `b`: no price of `b` is higher, and
// one is lower.
bool Dominated(const PriceTag& a, const PriceTag& b);

// One step of the ladder. Prefill rows and decode rows may be narrowed differently.
struct Rung {
  KeepProfile prefill;
  KeepProfile decode;
  PriceTag price;
  // K and V are kept in four bits, at half the bytes of int8, which the model's KV must then be.
  bool int4_kv = false;

  // Whether a sequence at this rung keeps K and V of `layer`: a block whose heads are all dropped
  // in both phases writes none.
  bool HoldsKv(int layer) const {
    return prefill.kept(layer, SiteKind::kHeads) > 0 || decode.kept(layer, SiteKind::kHeads) > 0;
  }
};

inline constexpr int kMostRungs = 64;

class Ladder {
 public:
  // A ladder of one rung: the dense model. Its price loses nothing.
  static Ladder DenseOnly(const SiteWidths& widths, const PriceTag& price = {});

  int size() const { return static_cast<int>(rungs_.size()); }
  const Rung& rung(int index) const { return rungs_[index]; }

  // Appends a rung. False, and the ladder unchanged, if it is not nested in the last one (fewer
  // bits count as keeping less), or one too many.
  bool Append(Rung rung);

  // What a rung loses, by what was measured since; rung 0 loses nothing.
  void SetQualityLoss(int rung, double nats) {
    if (rung > 0) rungs_[rung].price.quality_loss_nats = nats;
  }

  // The last rung up to which none is priced at more than `loss` nats per token; 0 if rung 1 is.
  int HardestWithin(double loss) const;

 private:
  std::vector<Rung> rungs_;
};

}  // namespace espalier
