// The rungs that a calibration is asked for, and what each layer keeps on them.
#pragma once

#include <compare>
#include <span>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "policy/ladder.h"

namespace espalier {

// What is behind a rung whose K and V are kept in four bits.
inline constexpr std::string_view kInt4Rung = "/int4";

// A rung as it is asked for: "0.4h0.1+3/int4".
struct RungPlan {
  double ratio = 0;      // of the MLPs' channels, left out
  double heads = 0;      // the same of query heads
  int blocks = 0;        // dropped
  bool int4_kv = false;  // K and V in four bits

  auto operator<=>(const RungPlan&) const = default;
};

// False if that is no rung.
bool ReadRung(std::string_view text, RungPlan* plan);
CLI::Validator IsRung();

// How MLP channels to leave out are divided among layers: as many in all as if those behind the
// first whole ones left out alike by the published rule (policy/kept_counts.h), or some more where
// a milder share leaves out more of a layer, so that rungs nest.
struct LayerWidths {
  int dense_layers = 0;              // first layers, which stay whole, heads too: fewer than all
  std::span<const double> left_out;  // shares with weights of their own, ascending, of all channels

  // For refits of each layer to what earlier ones miss, by which later layers make up for earlier
  // ones and nothing for the last. Both give way where a layer would leave out more than 85 %.
  int last_dense_layers = 0;  // whose MLPs stay whole
  double slope = 0;  // [0, 1): how much more than the mean the first of the others leaves out, and
                     // the last of them less
};

// What `espalier calibrate` takes if not told otherwise, the latter two where text refits; measured
// on SmolLM2-135M (tests/bench/pruning/README.md).
inline constexpr int kDenseLayers = 3;  // which bear pruning least
inline constexpr int kLastDenseLayers = 1;
inline constexpr double kSlope = 0.5;

// The rungs asked for, without prices, mildest first; rung 0 is dense. A ratio between two widths
// has the harder in its first layers, one below the first width in its last (measured:
// tests/bench/pruning/README.md). Blocks are dropped in the order told. InvalidArgument, which
// names
// --rungs, if they are not nested or none narrows the model.
absl::StatusOr<Ladder> PlanLadder(const LayerWidths& widths, const ModelConfig& config,
                                  std::span<const RungPlan> plans, std::span<const int> drop_order);

}  // namespace espalier
