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

std::vector<float> HeadScores(int width, std::span<const float> columns) {
  std::vector<float> scores;
  for (size_t at = 0; at < columns.size(); at += width) {
    const std::span<const float> of = columns.subspan(at, width);
    scores.push_back(std::accumulate(of.begin(), of.end(), 0.0f));
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
  // No two alike, and of like scores the higher index is the better one.
  std::vector<uint64_t> keys(scores.size());
  for (size_t c = 0; c < keys.size(); ++c) {
    const auto bits = std::bit_cast<uint32_t>(scores[c]);
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000;
    keys[c] = uint64_t{ordered} << 32 | c;
  }
  // The least of each band but the last, found by its leading bits first: nth_element's branches
  // would all be guesses, which took three times as long.
  constexpr int kLeading = 11, kShift = 64 - kLeading;
  std::vector<int> with(1 << kLeading);
  for (const uint64_t key : keys) ++with[key >> kShift];
  std::vector<uint64_t> least, alike;
  auto leading = static_cast<uint64_t>(with.size());
  for (int above = 0; const int count : counts) {  // `above`: keys whose bits are `leading` or more
    while (above < count) above += with[--leading];
    alike.clear();
    for (const uint64_t key : keys) {
      if (key >> kShift == leading) alike.push_back(key);
    }
    const auto nth = alike.end() - 1 - (above - count);
    std::nth_element(alike.begin(), nth, alike.end(), std::greater<>());
    least.push_back(*nth);
  }
  std::vector<int> next(1, 0);  // by band
  next.insert(next.end(), counts.begin(), counts.end());
  std::vector<int32_t> ranking(scores.size());
  for (size_t c = 0; c < keys.size(); ++c) {
    size_t band = 0;
    for (const uint64_t key : least) band += keys[c] < key ? 1 : 0;
    ranking[next[band]++] = static_cast<int32_t>(c);
  }
  return ranking;
}

}  // namespace espalier
