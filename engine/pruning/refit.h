// Calibration's arithmetic for one layer: in which order its channels may leave, and `down` fitted
// anew to those that stay.
//
// With W_S the columns of `down` for the channels kept, h what they hold, and e what is missing
// from W_S h to what the rows ought to be, least squares gives
//   W' = W_S + E[e h^T] (E[h h^T] + r I)^-1
// with a ridge r that draws W' to W_S, and, of moments about the means of h and e (but for what
// sinks add, sink_sums.h), with a bias
// E[e] - (W' - W_S) E[h]. If all before the layer is dense, e is what the channels
// that left would have added, W_P h_P. Rounding W' to 4 bits is such a loss again, which the
// columns not yet rounded make up for (Hassibi & Stork 1993; GPTQ, arXiv 2210.17323).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/pruning/channel_selector.h"

namespace espalier {

struct DownSite {
  int hidden = 0;
  int channels = 0;
  std::span<const float> down;     // [hidden, channels]
  std::span<const float> moments;  // [channels, channels], symmetric: E[h h^T]
};

// Channels best first: the last is the one whose loss the others make up for best, and so on
// (Optimal Brain Surgeon; 16 at a time of the 64 cheapest). The first 64 stay in natural order.
std::vector<int32_t> RankByElimination(const DownSite& site);

struct RefitSite {
  int hidden = 0;
  int kept = 0;                        // whole groups of kQuantGroup
  std::span<const float> down;         // [hidden, kept]: W_S
  std::span<const float> moments;      // [kept, kept], symmetric: E[h h^T]
  std::span<const float> missed;       // [hidden, kept]: E[e h^T]
  std::span<const float> energy;       // [kept]: E[h^2] without sinks, which the ridge goes by
  std::span<const float> mean;         // [kept]: E[h]
  std::span<const float> missed_mean;  // [hidden]: E[e]
};

// W', rounded, and the bias.
RefittedDown RefitDown(const RefitSite& site);

}  // namespace espalier
