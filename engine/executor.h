// Where a step's result comes from: the model, or a simulator that only advances time.
#pragma once

#include "absl/status/status.h"
#include "engine/scheduling/batch.h"

namespace espalier {

class Executor {
 public:
  virtual ~Executor() = default;

  // Computes K and V of every row into its pages and fills result->tokens for batch.logits.
  // An error means that the device is lost; the engine ends. Knows no queue.
  virtual absl::Status Execute(const Batch& batch, StepResult* result) = 0;
};

}  // namespace espalier
