#include "policy/level_policy.h"

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

float Input(double value) { return static_cast<float>(std::clamp(value, -4.0, 4.0)); }

}  // namespace

void LevelPolicy::Observe(const PressureReport& report, const Ladder& ladder) {
  hardest_ = ladder.size() - 1;
  level_ = std::min(level_, hardest_);
  if (!first_ && report.time_s - decided_s_ < options_.every_s) return;
  const float waiting = Input(std::log2(1.0 + report.waiting) / 8);
  const LevelState state = {Input(report.kv_used),
                            Input(report.kv_promised),
                            Input(report.queue_length),
                            Input(report.oldest_wait_s / options_.ttft_target_s),
                            Input(report.step_s / options_.tpot_target_s),
                            Input(std::log2(1.0 + report.running) / 8),
                            waiting,
                            first_ ? 0 : waiting - waiting_,
                            Input(static_cast<double>(level_) / std::max(1, hardest_)),
                            first_ ? 1.0F : 0.0F};
  const int hardest = report.kv_used > 1 ? hardest_ : ladder.HardestWithin(options_.load_loss);
  level_ = Decide(state, hardest + 1);
  decided_s_ = report.time_s;
  waiting_ = waiting;
  first_ = false;
}

int DqnPolicy::Decide(const LevelState& state, int rungs) {
  std::array<float, kMostHidden> hidden;
  std::array<float, kMostRungs> values;
  network_->Values(state, hidden, values);
  return static_cast<int>(std::max_element(values.begin(), values.begin() + rungs) -
                          values.begin());
}

}  // namespace espalier
