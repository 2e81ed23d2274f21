// Calibration's one way through the model, layer by layer: each layer's heads and channels are
// ranked by what they hold in the dense model, and `down`, for each count of them that rungs keep,
// is fitted to what is missing, after the layer, from the dense model's residual stream.
//
// What a rung misses at a layer is more than its own channels that left would have added: its rows
// come from pruned and rounded layers before. A fit that sees them makes up for those too, which
// halves how far the stream is off in the end (measured: tests/bench/pruning/README.md). `o` stays
// as loaded: what heads that left would have added is made up for by `down` of the same layer and
// later.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/model_executor.h"
#include "engine/model/pruning_file.h"
#include "policy/ladder.h"
#include "tools/channel_fit.h"

namespace espalier {

struct LayerFitOptions {
  // "elimination", or one of kImportanceNames. Heads go by the published measures alone: by kPpsp
  // where channels go by elimination.
  std::string rank;
  Compensation compensation = Compensation::kRefit;
  int step_rows = 512;  // as the executor's
  // A file for what is found so far, written every minute and when told to stop; the same options,
  // model and windows go on from it, to the same bits. Empty: none.
  std::string checkpoint = {};
  std::function<void(int layers)> resumed = {};  // told if so: how many layers were found there
};

// `windows` are as long as each other; the residual streams of all of them, of the dense model and
// of each rung, stay in memory: 4 * hidden bytes a token each. The executor's ladder is changed.
// ResourceExhausted if they do not fit; Cancelled if progress(done, total) says false.
absl::StatusOr<PruningData> FitLayers(
    const LayerFitOptions& options, const Ladder& planned, const ModelFile& file,
    std::span<const std::vector<int32_t>> windows, ModelExecutor* executor, Backend* backend,
    const std::function<bool(int64_t done, int64_t total)>& progress);

}  // namespace espalier
