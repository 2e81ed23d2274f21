// Calibration from what a server saw: rankings and refits of its sums, `espalier-server
// --channel-moments-file`, in place of text that runs through the model.
//
// Sums are of the dense model's channels alone, so each layer's `down` is fitted to what its own
// channels that left would have added, and not to what is missing from the residual stream by then
// (layer_fit.h), which is worth some of the loss (engine/pruning/README.md tells what).
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model/pruning_file.h"
#include "engine/pruning/channel_moments.h"
#include "kernels/backend.h"
#include "policy/ladder.h"
#include "tools/channel_fit.h"

namespace espalier {

struct MomentFitOptions {
  std::string rank;  // "elimination", or one of kImportanceNames
  Compensation compensation = Compensation::kRefit;
  int channel_group = 1;  // Decoder::channel_group
};

// That sums say what a ladder asks of them. InvalidArgument if it narrows heads, of which they say
// nothing, or if a layer was seen for fewer than kTokensAChannel tokens for each channel, which
// fits then take for more than they say (tests/bench/pruning/README.md): names the layer, how many
// there are and how many it takes.
inline constexpr int64_t kTokensAChannel = 4;
absl::Status CheckMoments(const ChannelMoments& moments, const Ladder& planned);

// InvalidArgument by CheckMoments; Cancelled if progress(layers done, layers) says false.
absl::StatusOr<PruningData> FitToMoments(
    const MomentFitOptions& options, const Ladder& planned, const ModelFile& file,
    const ChannelMoments& moments, Backend* backend,
    const std::function<bool(int64_t done, int64_t total)>& progress);

}  // namespace espalier
