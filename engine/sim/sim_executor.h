// The Executor of a simulation: knows what a step would take and draws tokens of no meaning.
#pragma once

#include "engine/executor.h"
#include "engine/sim/cost_model.h"

namespace espalier {

class SimExecutor final : public Executor {
 public:
  // `costs` has a cost for each rung that batches name, and must outlive the executor.
  explicit SimExecutor(const CostModel* costs) : costs_(costs) {}

  absl::Status Execute(const Batch& batch, StepResult* result) override {
    shape_.Take(batch, static_cast<int>(costs_->rungs.size()));
    seconds_ = costs_->Seconds(shape_);
    result->tokens.assign(batch.logits.size(), TokenResult{.token = 0});
    return absl::OkStatus();
  }

  double seconds() const { return seconds_; }  // of the last step

 private:
  const CostModel* const costs_;
  StepContents shape_;
  double seconds_ = 0;
};

}  // namespace espalier
