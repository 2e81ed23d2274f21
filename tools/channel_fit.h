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

// Of what rungs keep of a layer, but for all and none, the rung that does so in most layers, and
// the mildest of those: its stream is what `down` is fitted to. Rungs that mix counts share it.
std::map<int, int> KeptCounts(const Ladder& planned, int layer);

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
