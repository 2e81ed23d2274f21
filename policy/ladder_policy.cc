#include "policy/ladder_policy.h"

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

constexpr std::string_view kMemory = "memory";

// The first rung from `level` on that costs less KV, or the last.
int NextOfLessKv(const Ladder& ladder, int level) {
  const double bytes = ladder.rung(level).price.kv_bytes_per_token;
  while (level + 1 < ladder.size() && !(ladder.rung(level).price.kv_bytes_per_token < bytes)) {
    ++level;
  }
  return level;
}

// Whether rung `level` costs less KV than the one before.
bool FreesKv(const Ladder& ladder, int level) {
  return level > 0 && ladder.rung(level).price.kv_bytes_per_token <
                          ladder.rung(level - 1).price.kv_bytes_per_token;
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
  const int hardest = ladder.size() - 1;
  const bool memory = report.kv_used > 1;
  load_hardest_ = ladder.HardestWithin(options_.load_loss);
  level_ = std::min(level_, hardest);
  if (!std::isfinite(report.time_s)) return;
  if (!low) low_since_s_ = report.time_s;
  calm_ = low && report.time_s - low_since_s_ >= options_.lower_dwell_s;
  if (!(report.kv_used <= (FreesKv(ladder, level_) ? options_.kv_lower : 1))) {
    kv_low_since_s_ = report.time_s;
  }

  int level = level_;
  double changed_s = changed_s_;
  // Of many dwells without a report, idle ones, all count.
  const auto fall = [&](double since_s, int least) {
    since_s = std::max(since_s, changed_s);
    const double dwells = (report.time_s - since_s) / options_.lower_dwell_s;
    const int rungs = static_cast<int>(std::clamp<double>(dwells, 0, level - least));
    level -= rungs;
    changed_s = since_s + rungs * options_.lower_dwell_s;
  };
  if (memory) {
    level = NextOfLessKv(ladder, level_);
  } else if (level_ > load_hardest_) {
    fall(kv_low_since_s_, load_hardest_);
    if (low && level == load_hardest_) fall(low_since_s_, 0);
  } else if (high != std::end(signals)) {
    if (report.time_s - changed_s_ >= options_.raise_dwell_s) {
      level = std::min(level_ + 1, load_hardest_);
    }
  } else if (low) {
    fall(low_since_s_, 0);
  }
  most_ = memory ? hardest : std::max(level, load_hardest_);
  refuses_ = level >= (memory ? hardest : load_hardest_) && signals[0].value >= options_.wait.raise;
  // What memory raised, load may hold.
  const bool held = !memory && level > 0 && level <= load_hardest_ && high != std::end(signals);
  if (level > level_) {
    reason_ = memory ? kMemory : high->name;
  } else if (held && reason_ == kMemory) {
    reason_ = high->name;
  }
  if (level == level_) return;
  level_ = level;
  changed_s_ = report.time_s;
}

}  // namespace espalier
