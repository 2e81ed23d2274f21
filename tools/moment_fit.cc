#include "tools/moment_fit.h"

#include <fmt/format.h>

#include <map>
#include <span>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "engine/model/down_norms.h"

namespace espalier {
namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// What a layer's channels held together.
struct LayerSums {
  int hidden = 0;
  int channels = 0;
  std::span<const float> down;       // [hidden, channels]
  std::span<const int32_t> ranking;  // [channels]
  std::span<const float> moments;    // [channels, channels]
  std::span<const float> energy;     // [channels]
  std::span<const float> mean;       // [channels]
};

// What those that leave would have added, W_P h_P, is what is missing.
RefittedDown RefitTo(const LayerSums& of, int kept, Compensation compensation) {
  const std::span<const int32_t> stay = of.ranking.first(kept), leave = of.ranking.subspan(kept);
  const int left = of.channels - kept;
  const std::vector<float> left_down = TakeColumns(of.down, of.channels, leave);
  const std::vector<float> left_mean = TakeColumns(of.mean, of.channels, leave);
  const Eigen::Map<const RowMajor> lost(left_down.data(), of.hidden, left);
  std::vector<float> missed_mean(of.hidden);
  Eigen::Map<Eigen::VectorXf>(missed_mean.data(), of.hidden) =
      (lost.cast<double>() *
       Eigen::Map<const Eigen::VectorXf>(left_mean.data(), left).cast<double>())
          .cast<float>();
  if (compensation == Compensation::kMean) return {.down = {}, .bias = std::move(missed_mean)};

  const std::vector<float> columns = TakeColumns(of.moments, of.channels, stay);
  std::vector<float> among, across;  // E[h_S h_S^T], E[h_P h_S^T]
  for (const int32_t row : stay) {
    const auto* const from = columns.data() + int64_t{row} * kept;
    among.insert(among.end(), from, from + kept);
  }
  for (const int32_t row : leave) {
    const auto* const from = columns.data() + int64_t{row} * kept;
    across.insert(across.end(), from, from + kept);
  }
  std::vector<float> missed(static_cast<size_t>(of.hidden) * kept);
  Eigen::Map<RowMajor>(missed.data(), of.hidden, kept).noalias() =
      lost * Eigen::Map<const RowMajor>(across.data(), left, kept);
  return RefitDown({.hidden = of.hidden,
                    .kept = kept,
                    .down = TakeColumns(of.down, of.channels, stay),
                    .moments = among,
                    .missed = missed,
                    .energy = TakeColumns(of.energy, of.channels, stay),
                    .mean = TakeColumns(of.mean, of.channels, stay),
                    .missed_mean = missed_mean});
}

}  // namespace

absl::Status CheckMoments(const ChannelMoments& moments, const Ladder& planned) {
  const SiteWidths widths = planned.rung(0).prefill.widths();
  for (int rung = 1; rung < planned.size(); ++rung) {
    for (int layer = 0; layer < widths.layers; ++layer) {
      const int heads = planned.rung(rung).prefill.kept(layer, SiteKind::kHeads);
      if (heads == 0 || heads == widths.heads) continue;
      return absl::InvalidArgumentError(
          fmt::format("a rung keeps {} of {} heads: sums of channels say nothing of which; --rungs "
                      "without them",
                      heads, widths.heads));
    }
  }
  const int layer = moments.least_layer();
  const int64_t tokens = moments.tokens();
  const int64_t asked = kTokensAChannel * moments.channels();
  if (tokens >= asked) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("layer {} was seen for {} tokens, and {} channels take {} at least: let the "
                  "server gather for longer",
                  layer, tokens, moments.channels(), asked));
}

absl::StatusOr<PruningData> FitToMoments(
    const MomentFitOptions& options, const Ladder& planned, const ModelFile& file,
    const ChannelMoments& moments, Backend* backend,
    const std::function<bool(int64_t done, int64_t total)>& progress) {
  if (absl::Status status = CheckMoments(moments, planned); !status.ok()) return status;
  const ModelConfig& config = file.config();
  PruningData data;
  data.layers.resize(config.layers);
  const std::vector<std::map<int, int>> kept_counts = KeptCounts(planned);
  for (int layer = 0; layer < config.layers; ++layer) {
    if (!progress(layer, config.layers)) {
      return absl::CancelledError("interrupted; no ladder was written");
    }
    const std::map<int, int>& counts = kept_counts[layer];
    if (counts.empty()) continue;
    const absl::StatusOr<std::vector<float>> down = ReadDown(file, layer);
    if (!down.ok()) return down.status();
    const std::vector<float> products = moments.Mean(layer), mean = moments.FirstMoment(layer);
    const std::vector<float> energy = moments.Energy(layer);
    PruningData::Layer& found = data.layers[layer];
    found.ranking = RankChannels(options.rank, {config.hidden, config.channels, *down, products},
                                 energy, mean, options.channel_group);
    if (options.compensation == Compensation::kNone) continue;
    std::vector<std::pair<int, RefittedDown*>> fits;
    for (const auto& [kept, rung] : counts) fits.emplace_back(kept, &found.refits[kept]);
    const LayerSums sums{.hidden = config.hidden,
                         .channels = config.channels,
                         .down = *down,
                         .ranking = found.ranking,
                         .moments = products,
                         .energy = energy,
                         .mean = mean};
    backend->ParallelFor(static_cast<int>(fits.size()), [&](int i) {
      *fits[i].second = RefitTo(sums, fits[i].first, options.compensation);
    });
  }
  progress(config.layers, config.layers);
  return data;
}

}  // namespace espalier
