// What calibration does with one layer's moments, whether they are of text that runs through the
// model (layer_fit.h) or of what a server saw (moment_fit.h): which channels rungs keep, their
// ranking, and what a refit is made of.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/pruning/importance.h"
#include "engine/pruning/refit.h"
#include "policy/ladder.h"

namespace espalier {

// What makes up for channels that left.
enum class Compensation : uint8_t {
  kNone,   // nothing: rankings alone
  kMean,   // a bias: the mean of what is missing
  kRefit,  // `down` by least squares, and a bias
};
inline constexpr std::string_view kCompensationNames[] = {"none", "mean", "refit"};

// Of each layer, what rungs keep of it, but for all and none, and the rung whose stream `down` is
// then fitted to. As few rungs as may be: again and again the one that keeps most of what is left,
// the mildest of such; rungs that mix the counts of others share theirs.
std::vector<std::map<int, int>> KeptCounts(const Ladder& planned);

// One of kImportanceNames; none: elimination.
std::optional<Importance> PublishedMeasure(const std::string& by);

// Channels best first, by elimination or a published measure; energy [channels] is E[h^2], mean
// [channels] E[h]. `group`: ScoreGroups.
std::vector<int32_t> RankChannels(const std::string& by, const DownSite& site,
                                  std::span<const float> energy, std::span<const float> mean,
                                  int group);

// The listed columns of a matrix [rows, width], in that order: [rows, columns].
std::vector<float> TakeColumns(std::span<const float> matrix, int width,
                               std::span<const int32_t> columns);

}  // namespace espalier
