// Where a step's result comes from: the model, or a simulator that only advances time.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/scheduling/batch.h"
#include "policy/policy.h"

namespace espalier {

// How far weights have come back.
struct WeightsFit {
  bool done = true;
  double seconds = 0;  // that this call took
};

class Executor {
 public:
  virtual ~Executor() = default;

  // Computes K and V of every row into its pages and fills result->tokens for batch.logits.
  // An error means that the device is lost; the engine ends. Knows no queue.
  virtual absl::Status Execute(const Batch& batch, StepResult* result) = 0;

  // Makes pages of four bits, in order, before anything else is computed or moved.
  virtual void PackPages(std::span<const PagePacking> /*packings*/) {}

  // There are `pages` KV pages from now on: copies what lies in each page `from` to its `to`, then
  // gives the memory of all further ones back, until they are written to again. Where there is no
  // memory there is nothing to do.
  virtual void FitPages(std::span<const std::pair<int32_t, int32_t>> /*moves*/, int /*pages*/) {}

  // How many KV pages the weights are worth that no rung of the set needs; 0: they stay.
  virtual int ReleasablePages(RungSet /*served*/) const { return 0; }

  // Weights that rungs of the set need come back to memory, and the rest leaves it, layer by layer,
  // so that no more of them is there than before or after, and a layer's. Unless it is to be done
  // at once it stops after some milliseconds, for the next call to go on. An error: they cannot
  // come back; the engine ends.
  virtual absl::StatusOr<WeightsFit> FitWeights(RungSet /*served*/, bool /*at_once*/) {
    return WeightsFit{};
  }
};

}  // namespace espalier
