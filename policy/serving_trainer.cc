#include "policy/serving_trainer.h"

#include <algorithm>
#include <utility>

namespace espalier {

int ServingTrainer::Decide(const LevelState& state, int rungs) {
  std::vector<uint8_t> allowed(dqn_->network().shape().actions);
  std::fill_n(allowed.begin(), rungs, uint8_t{1});
  const int last = step_.action;
  if (!step_.state.empty()) {
    step_.reward = static_cast<float>(reward_);
    step_.next_state.assign(state.begin(), state.end());
    step_.next_allowed = allowed;
    dqn_->Remember(std::move(step_));
    dqn_->Learn();
  }
  step_ = {.state = {state.begin(), state.end()}};
  reward_ = 0;
  if (!dqn_->Explores(epsilon_)) {
    step_.action = dqn_->Choose(state, allowed);
  } else if (dqn_->Explores(0.5)) {
    step_.action = static_cast<int>(dqn_->random()() % static_cast<uint64_t>(rungs));
  } else {
    step_.action = std::clamp(last + (dqn_->Explores(0.5) ? 1 : -1), 0, rungs - 1);
  }
  return step_.action;
}

void ServingTrainer::End() {
  if (step_.state.empty()) return;
  step_.reward = static_cast<float>(reward_);
  dqn_->Remember(std::move(step_));
  step_ = {};
}

}  // namespace espalier
