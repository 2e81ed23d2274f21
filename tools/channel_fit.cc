#include "tools/channel_fit.h"

#include <algorithm>
#include <iterator>

namespace espalier {

std::map<int, int> KeptCounts(const Ladder& planned, int layer) {
  const SiteWidths widths = planned.rung(0).prefill.widths();
  const auto kept = [&](int rung, int of) {
    return planned.rung(rung).prefill.kept(of, SiteKind::kChannels);
  };
  const auto layers = [&](int count, int rung) {
    int with = 0;
    for (int of = 0; of < widths.layers; ++of) with += kept(rung, of) == count;
    return with;
  };
  std::map<int, int> counts;
  for (int rung = 1; rung < planned.size(); ++rung) {
    const int count = kept(rung, layer);
    if (count == 0 || count == widths.channels) continue;
    const auto [found, added] = counts.try_emplace(count, rung);
    if (!added && layers(count, rung) > layers(count, found->second)) found->second = rung;
  }
  return counts;
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
