#include "policy/level_policy.h"

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

float Input(double value) { return static_cast<float>(std::clamp(value, -4.0, 4.0)); }

}  // namespace

void LevelPolicy::Observe(const PressureReport& report, const Ladder& ladder) {
  const int hardest = ladder.size() - 1;
  level_ = std::min(level_, hardest);
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
                            Input(report.first_token_s / options_.ttft_target_s),
                            Input(std::log2(1.0 + report.arrivals_per_s) / 8),
                            Input(static_cast<double>(level_) / std::max(1, hardest)),
                            first_ ? 1.0F : 0.0F};
  const int open = report.kv_used > 1 ? hardest : ladder.HardestWithin(options_.load_loss);
  level_ = Decide(state, open + 1);
  decided_s_ = report.time_s;
  waiting_ = waiting;
  first_ = false;
}

int DqnPolicy::Decide(const LevelState& state, int rungs) {
  std::array<float, kMostHidden> hidden;
  network_->Values(state, hidden, values_);
  open_ = rungs;
  return static_cast<int>(std::ranges::max_element(scores()) - scores().begin());
}

}  // namespace espalier
