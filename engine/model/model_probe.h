// A probe for a model: what its two kinds of sites held so far, and the norms of its weights.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model_config.h"
#include "engine/pruning/history.h"
#include "engine/pruning/probe.h"

namespace espalier {

struct SiteHistories {
  // Zeros. `exact_positions` as History.
  explicit SiteHistories(const ModelConfig& config, int exact_positions = 0);

  History channels;
  History heads;
};

// InvalidArgument, with file and tensor, if a `down` or `o` is not there.
absl::StatusOr<std::unique_ptr<Probe>> MakeProbe(const ProbeOptions& options, const ModelFile& file,
                                                 SiteHistories histories);

}  // namespace espalier
