#include "engine/pruning/importance.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace espalier {

std::vector<float> DownNorms(Importance importance, std::span<const float> down, int channels) {
  std::vector<double> sums(channels);
  for (size_t i = 0; i < down.size(); ++i) {
    const double w = std::abs(down[i]);
    sums[i % channels] += importance == Importance::kPpsp      ? w * w * w * w
                          : importance == Importance::kWandaSp ? w
                                                               : w * w;
  }
  const bool root = importance == Importance::kPpsp || importance == Importance::kMagnitude;
  std::vector<float> norms(channels);
  for (int c = 0; c < channels; ++c) {
    norms[c] = static_cast<float>(root ? std::sqrt(sums[c]) : sums[c]);
  }
  return norms;
}

std::vector<float> Scores(Importance importance, std::span<const float> energy,
                          std::span<const float> mean, std::span<const float> norms) {
  std::vector<float> scores(norms.begin(), norms.end());
  for (size_t c = 0; c < scores.size(); ++c) {
    switch (importance) {
      case Importance::kPpsp:
        scores[c] *= energy[c];
        break;
      case Importance::kWandaSp:
        scores[c] *= std::sqrt(energy[c]);
        break;
      case Importance::kFlap:
        scores[c] *= energy[c] - mean[c] * mean[c];
        break;
      case Importance::kMagnitude:
        break;
    }
  }
  return scores;
}

std::vector<int32_t> RankByScore(std::span<const float> scores) {
  std::vector<int32_t> ranking(scores.size());
  std::iota(ranking.rbegin(), ranking.rend(), 0);
  std::ranges::stable_sort(ranking, [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  return ranking;
}

std::vector<int32_t> RankInBands(std::span<const float> scores, std::span<const int> counts) {
  std::vector<int32_t> ranking(scores.size());
  std::iota(ranking.begin(), ranking.end(), 0);
  const auto better = [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a > b;
  };
  auto end = ranking.end();
  for (size_t i = counts.size(); i-- > 0;) {
    const auto border = ranking.begin() + counts[i];
    if (border < end) std::nth_element(ranking.begin(), border, end, better);
    std::sort(border, end);
    end = border;
  }
  std::sort(ranking.begin(), end);
  return ranking;
}

}  // namespace espalier
