// What a probe learned from traffic, kept over a restart: a GGUF file of energies, never of text.
//
//   general.architecture       "espalier-history"
//   espalier.fingerprint       string, FingerprintOf(model)
//   blk.LAYER.energy.weight    F32 [buckets of positions, channels]
//   blk.LAYER.heads.weight     F32 [buckets of positions, heads * head_dim]; none: zeros
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model/model_probe.h"
#include "engine/pruning/history.h"

namespace espalier {

// NotFound if there is no file; InvalidArgument, with file and key or tensor, if it is of another
// model or not whole, or if a value is not finite or negative.
absl::StatusOr<SiteHistories> ReadHistory(const std::string& path, const ModelFile& model);

// Through a file beside it, so that none is ever half written. `fingerprint` is the model's. Errors
// name the path.
absl::Status WriteHistory(const std::string& path, const std::string& fingerprint,
                          const History& channels, const History& heads);

}  // namespace espalier
