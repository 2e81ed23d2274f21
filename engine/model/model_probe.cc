#include "engine/model/model_probe.h"

#include <utility>
#include <vector>

#include "engine/model/down_norms.h"

namespace espalier {

SiteHistories::SiteHistories(const ModelConfig& config, int exact_positions)
    : channels(config.layers, config.columns(SiteKind::kChannels), exact_positions),
      heads(config.layers, config.columns(SiteKind::kHeads), exact_positions) {}

absl::StatusOr<std::unique_ptr<Probe>> MakeProbe(const ProbeOptions& options, const ModelFile& file,
                                                 SiteHistories histories) {
  absl::StatusOr<std::vector<std::vector<float>>> channels = PpspNorms(file, SiteKind::kChannels);
  if (!channels.ok()) return channels.status();
  absl::StatusOr<std::vector<std::vector<float>>> heads = PpspNorms(file, SiteKind::kHeads);
  if (!heads.ok()) return heads.status();
  return std::make_unique<Probe>(
      options, ProbeSites{std::move(histories.channels), *std::move(channels)},
      ProbeSites{std::move(histories.heads), *std::move(heads)}, file.config().head_dim);
}

}  // namespace espalier
