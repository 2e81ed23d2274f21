#include "tools/channel_fit.h"

#include <algorithm>
#include <iterator>

namespace espalier {

std::vector<std::map<int, int>> KeptCounts(const Ladder& planned) {
  const SiteWidths widths = planned.rung(0).prefill.widths();
  std::vector<std::map<int, int>> counts(widths.layers);
  const auto to_fit = [&](int rung, int layer) {
    const int kept = planned.rung(rung).prefill.kept(layer, SiteKind::kChannels);
    return kept > 0 && kept < widths.channels && !counts[layer].contains(kept) ? kept : 0;
  };
  while (true) {
    int best = 0, most = 0;
    for (int rung = 1; rung < planned.size(); ++rung) {
      int layers = 0;
      for (int layer = 0; layer < widths.layers; ++layer) layers += to_fit(rung, layer) > 0;
      if (layers > most) best = rung, most = layers;
    }
    if (best == 0) return counts;
    for (int layer = 0; layer < widths.layers; ++layer) {
      if (const int kept = to_fit(best, layer); kept > 0) counts[layer][kept] = best;
    }
  }
}

std::optional<Importance> PublishedMeasure(const std::string& by) {
  const auto* const name = std::ranges::find(kImportanceNames, by);
  if (name == std::end(kImportanceNames)) return std::nullopt;
  return static_cast<Importance>(name - std::begin(kImportanceNames));
}

std::vector<int32_t> RankChannels(const std::string& by, const DownSite& site,
                                  std::span<const float> energy, std::span<const float> mean,
                                  int group) {
  const std::optional<Importance> importance = PublishedMeasure(by);
  if (!importance.has_value()) return RankByElimination(site);
  std::vector<float> scores =
      Scores(*importance, energy, mean, DownNorms(*importance, site.down, site.channels));
  ScoreGroups(group, scores);
  return RankByScore(scores);
}

std::vector<float> TakeColumns(std::span<const float> matrix, int width,
                               std::span<const int32_t> columns) {
  std::vector<float> taken;
  taken.reserve(matrix.size() / width * columns.size());
  for (size_t begin = 0; begin < matrix.size(); begin += width) {
    for (const int32_t column : columns) taken.push_back(matrix[begin + column]);
  }
  return taken;
}

}  // namespace espalier
