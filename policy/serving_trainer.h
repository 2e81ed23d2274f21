// A level policy that learns while a simulation runs: it explores, and is told what came of it.
#pragma once

#include <vector>

#include "policy/level_policy.h"
#include "policy/training/double_dqn.h"

namespace espalier {

// One episode, of one simulation. Its decisions become what `dqn` remembers; a decision's reward is
// what Reward was told until the next.
class ServingTrainer final : public LevelPolicy {
 public:
  // `dqn` must outlive the episode. `epsilon`: the chance of another level than the best; half of
  // those are a step from the last one, since a level matters only if it lasts.
  ServingTrainer(const LevelPolicyOptions& options, double epsilon, DoubleDqn* dqn)
      : LevelPolicy(options), epsilon_(epsilon), dqn_(dqn) {}

  void Reward(double reward) { reward_ += reward; }
  // After the simulation: the last decision had no successor.
  void End();

  std::string_view name() const override { return "dqn"; }

 protected:
  int Decide(const LevelState& state, int rungs) override;

 private:
  double epsilon_;
  DoubleDqn* const dqn_;
  Transition step_;  // empty state: none yet
  double reward_ = 0;
};

}  // namespace espalier
