#include "policy/shield.h"

#include <algorithm>
#include <cmath>

namespace espalier {
namespace {

// Of what is known of memory; it is looked at four times a second.
constexpr double kStaleSeconds = 5;

bool Sane(const PressureReport& report, double last_s) {
  const double numbers[] = {report.kv_used,       report.kv_promised,    report.queue_length,
                            report.oldest_wait_s, report.step_s,         report.memory_age_s,
                            report.free_memory,   report.foreign_memory, report.first_token_s,
                            report.arrivals_per_s};
  return std::isfinite(report.time_s) && report.time_s >= last_s && report.running >= 0 &&
         report.waiting >= 0 && report.memory_age_s <= kStaleSeconds &&
         std::ranges::all_of(numbers,
                             [](double number) { return std::isfinite(number) && number >= 0; });
}

}  // namespace

void Shield::Observe(const PressureReport& report, const Ladder& ladder) {
  const bool sane = Sane(report, time_s_);
  rule_.Observe(report, ladder);
  if (sane) policy_->Observe(report, ladder);
  const int hardest = ladder.size() - 1;
  const int load_hardest = ladder.HardestWithin(options_.load_loss);
  level_ = std::min(level_, hardest);
  const int wanted = policy_->wanted();
  const bool followed = sane && wanted >= 0 && wanted <= hardest;
  int level = sane && rule_.calm() ? 0 : followed ? wanted : rule_.level();
  // Behind a queue that the rule lets grow no further, a milder level is no choice.
  const bool bound = (report.kv_used > 1 || rule_.refuses()) && rule_.level() > level;
  if (bound) level = rule_.level();
  level = std::min(level, std::max(load_hardest, rule_.level()));
  if (!std::isfinite(report.time_s)) return;
  if (level < level_) {
    const bool due = report.time_s - changed_s_ >= options_.lower_dwell_s;
    const double silent = (report.time_s - time_s_) / options_.lower_dwell_s;
    const int dwells = static_cast<int>(std::clamp<double>(silent, 1, level_ - level));
    level = due ? level_ - dwells : level_;
  }
  refuses_ = rule_.refuses() || (level >= (report.kv_used > 1 ? hardest : load_hardest) &&
                                 report.oldest_wait_s >= options_.refuses_behind_s());
  if (level > level_) reason_ = followed && !bound ? policy_->reason() : rule_.reason();
  if (level != level_) changed_s_ = report.time_s;
  level_ = level;
  most_ = std::max(level, load_hardest);
  time_s_ = std::max(time_s_, report.time_s);
}

}  // namespace espalier
