#include "policy/ladder_policy.h"

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

// The first rung from `level` on that costs less KV, or the last.
int NextOfLessKv(const Ladder& ladder, int level) {
  const double bytes = ladder.rung(level).price.kv_bytes_per_token;
  while (level + 1 < ladder.size() && !(ladder.rung(level).price.kv_bytes_per_token < bytes)) {
    ++level;
  }
  return level;
}

}  // namespace

void LadderPolicy::Observe(const PressureReport& report, const Ladder& ladder) {
  struct Signal {
    double value;
    PressureBand band;
    std::string_view name;
  };
  const Signal signals[] = {
      {report.oldest_wait_s / options_.ttft_target_s, options_.wait, "queue"},
      {report.step_s / options_.tpot_target_s, options_.step, "latency"},
  };
  const auto* const high = std::ranges::find_if(
      signals, [](const Signal& signal) { return signal.value >= signal.band.raise; });
  const bool low =
      report.kv_used <= options_.kv_lower && std::ranges::all_of(signals, [](const Signal& signal) {
        return signal.value <= signal.band.lower;
      });
  hardest_ = ladder.size() - 1;
  level_ = std::min(level_, hardest_);
  if (!std::isfinite(report.time_s)) return;
  if (!low) low_since_s_ = report.time_s;

  int level = level_;
  if (report.kv_used > 1) {
    level = NextOfLessKv(ladder, level_);
  } else if (high != std::end(signals)) {
    if (report.time_s - changed_s_ >= options_.raise_dwell_s)
      level = std::min(level_ + 1, hardest_);
  } else if (low) {
    // Of many dwells without a report, idle ones, all count.
    const double dwells =
        (report.time_s - std::max(low_since_s_, changed_s_)) / options_.lower_dwell_s;
    level -= static_cast<int>(std::clamp<double>(dwells, 0, level_));
  }
  refuses_ = level == hardest_ && signals[0].value >= options_.wait.raise;
  if (level == level_) return;
  if (level > level_) reason_ = report.kv_used > 1 ? "memory" : high->name;
  level_ = level;
  changed_s_ = report.time_s;
}

int LadderPolicy::ChooseRung(const RequestTraits& traits) const {
  return RungAtLevel(traits, level_, hardest_);
}

}  // namespace espalier
