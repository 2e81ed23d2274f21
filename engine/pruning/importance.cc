#include "engine/pruning/importance.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
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

void ScoreGroups(int group, std::span<float> scores) {
  if (group <= 1) return;
  for (size_t begin = 0; begin < scores.size(); begin += group) {
    const std::span of = scores.subspan(begin, std::min<size_t>(group, scores.size() - begin));
    std::ranges::fill(of, std::accumulate(of.begin(), of.end(), 0.0f));
  }
}

std::vector<int32_t> RankByScore(std::span<const float> scores) {
  std::vector<int32_t> ranking(scores.size());
  std::iota(ranking.rbegin(), ranking.rend(), 0);
  std::ranges::stable_sort(ranking, [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  return ranking;
}

std::vector<int32_t> RankInBands(std::span<const float> scores, std::span<const int> counts) {
  // No two alike, and of like scores the higher index is the better one.
  std::vector<uint64_t> keys(scores.size());
  for (size_t c = 0; c < keys.size(); ++c) {
    const auto bits = std::bit_cast<uint32_t>(scores[c]);
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000;
    keys[c] = uint64_t{ordered} << 32 | c;
  }
  std::vector<uint64_t> best = keys, least;  // least: of each band but the last
  auto end = best.end();
  for (size_t i = counts.size(); i-- > 0; end = best.begin() + counts[i]) {
    const auto last = best.begin() + counts[i] - 1;
    if (last + 1 < end) std::nth_element(best.begin(), last, end, std::greater<>());
    least.insert(least.begin(), last + 1 < end ? *last : 0);
  }
  std::vector<int> next(1, 0);  // by band
  next.insert(next.end(), counts.begin(), counts.end());
  std::vector<int32_t> ranking(scores.size());
  for (size_t c = 0; c < keys.size(); ++c) {
    size_t band = 0;
    while (band < least.size() && keys[c] < least[band]) ++band;
    ranking[next[band]++] = static_cast<int32_t>(c);
  }
  return ranking;
}

}  // namespace espalier
