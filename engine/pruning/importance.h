// How much an MLP channel, or a head's column, matters, by the published measures: its energy times
// a norm of its row of `down`, or of `o`.
//
// All of them factor, so that a layer's norms are computed once and ranking costs a multiplication
// a channel (w4 for Probe Pruning: |F_c W_c^2|_2 = F_c sqrt(sum_o W_oc^4)).
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace espalier {

enum class Importance : uint8_t {
  kPpsp,       // E[h^2] * sqrt(sum W^4)     Probe Pruning, arXiv 2502.15618
  kWandaSp,    // sqrt(E[h^2]) * sum |W|     Wanda for structures
  kFlap,       // Var[h] * sum W^2           FLAP's WIFV, arXiv 2312.11983, without its bias
  kMagnitude,  // sqrt(sum W^2)
};

inline constexpr std::string_view kImportanceNames[] = {"ppsp", "wanda-sp", "flap", "magnitude"};

// The norm that goes with a measure, of each column of down [hidden, channels].
std::vector<float> DownNorms(Importance importance, std::span<const float> down, int channels);

// Of each channel, from E[h^2] and, for kFlap, E[h] ([channels] each; else may be empty).
std::vector<float> Scores(Importance importance, std::span<const float> energy,
                          std::span<const float> mean, std::span<const float> norms);

// Where channels leave in whole aligned groups, each has the score of its group: the sum of theirs.
// Rankings below then split none, as long as counts are of whole groups.
void ScoreGroups(int group, std::span<float> scores);

// Of heads: the sum of the scores of each `width` columns.
std::vector<float> HeadScores(int width, std::span<const float> columns);

// Channels by falling score; of two alike the lower index leaves first.
std::vector<int32_t> RankByScore(std::span<const float> scores);

// The same as far as rungs that keep `counts` of them, ascending and each of [1, scores.size()],
// can tell, and not sorted: within the first, between two and after the last, they stand in natural
// order.
std::vector<int32_t> RankInBands(std::span<const float> scores, std::span<const int> counts);

}  // namespace espalier
