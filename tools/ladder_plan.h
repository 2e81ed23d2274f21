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

// How channels to leave out are divided among layers: as many in all as the published rule says for
// the first layers whole (policy/kept_counts.h).
struct LayerWidths {
  int dense_layers = 0;              // first layers, which stay whole
  std::span<const double> left_out;  // shares that the others may leave out, ascending
  // Last layers, which stay whole too, and how much more than the mean the first of the others
  // leaves out, and the last of them less: [0, 1); none keeps fewer than another before it. Where
  // later layers are fitted to make up for earlier ones, those can spare more, and for the last one
  // nothing makes up. Where that would leave out more than 85 % of a layer, fewer last layers stay
  // whole, then the slope is less.
  int last_dense_layers = 0;
  double slope = 0;
};

// The rungs asked for, without prices, mildest first; rung 0 is dense. A ratio between two widths
// has the harder in its first layers: what those leave in the stream is what later layers of the
// harder rung were fitted to. Blocks are dropped in the order told. InvalidArgument, which names
// --rungs, if they are not nested or none narrows the model.
absl::StatusOr<Ladder> PlanLadder(const LayerWidths& widths, const ModelConfig& config,
                                  std::span<const RungPlan> plans, std::span<const int> drop_order);

}  // namespace espalier
