// Calibration's arithmetic for one layer: in which order its channels may leave, and `down` fitted
// anew to those that stay.
//
// Both follow from the second moments of what meets `down`. Leaving out channels P and multiplying
// the others, S, by W' in place of W_S costs E|W h - W' h_S|^2; least squares gives
//   W' = W_S + W_P M_PS (M_SS + r I)^-1,   M = E[h h^T],
// with a ridge r that draws W' to W_S. Rounding W' to 4 bits is such a loss again, which the
// columns not yet rounded make up for (Hassibi & Stork 1993; GPTQ, arXiv 2210.17323).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/weight.h"

namespace espalier {

struct DownSite {
  int hidden = 0;
  int channels = 0;
  std::span<const float> down;     // [hidden, channels]
  std::span<const float> moments;  // [channels, channels], symmetric: M
};

// Channels best first: the last is the one whose loss the others make up for best, and so on
// (Optimal Brain Surgeon; 16 at a time of the 64 cheapest). The first 64 stay in natural order.
std::vector<int32_t> RankByElimination(const DownSite& site);

// `down` for the kept channels, in their order, of which there are whole groups of kQuantGroup:
// [hidden, kept / kQuantGroup] groups. `kept` lists channels, none twice.
std::vector<FourBitGroup> RefitDown(const DownSite& site, std::span<const int32_t> kept);

// What a `down` for the kept channels misses: E|W h - W' h_S|^2 / E|W h|^2. Empty groups: W' = W_S.
double MissedShare(const DownSite& site, std::span<const int32_t> kept,
                   std::span<const FourBitGroup> groups);

}  // namespace espalier
