// Where a step's result comes from: the model, or a simulator that only advances time.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "engine/scheduling/batch.h"

namespace espalier {

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
};

}  // namespace espalier
