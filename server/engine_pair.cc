#include "server/engine_pair.h"

#include <algorithm>
#include <utility>

#include "engine/scheduling/invariant.h"

namespace espalier {
namespace {

// Adds what counts since start.
void AddTotals(const SchedulerStats& from, SchedulerStats* to) {
  to->preemptions += from.preemptions;
  to->recomputed_tokens += from.recomputed_tokens;
  to->rung_moves += from.rung_moves;
  to->prefix_queries += from.prefix_queries;
  to->prefix_hits += from.prefix_hits;
  to->prefix_evicted_pages += from.prefix_evicted_pages;
  to->stages.full += from.stages.full;
  to->stages.probed += from.stages.probed;
  to->stages.history += from.stages.history;
}

void AddTotals(const WeightsReport& from, WeightsReport* to) {
  to->releases += from.releases;
  to->returns += from.returns;
  to->return_s_sum += from.return_s_sum;
}

}  // namespace

void EnginePair::Replace(Engine* engine, Instant now) {
  Invariant(left_ == nullptr && engine->idle(), "an engine is replaced while another is left");
  left_ = std::exchange(current_, engine);
  left_had_turn_ = false;
  lefts_pages_ = pages_;
  currents_pages_ = engine->scheduler().pages_total();
  Share(now);
}

void EnginePair::Retire(Instant now) {
  Invariant(left_ != nullptr && left_->idle(), "an engine retires that has work");
  AddTotals(left_->scheduler().stats(), &retired_);
  AddTotals(left_->weights(), &retired_weights_);
  left_ = nullptr;
  current_->LimitPages(pages_, now);
}

int64_t EnginePair::PagesOf(const Request& request) const {
  return current_->scheduler().PagesAtMost(request);
}

bool EnginePair::MustWait(const Request& request) const {
  if (left_ == nullptr) return false;
  const int64_t pages = current_->scheduler().LeastPages(request);
  return pages > current_->scheduler().page_limit() && pages <= pages_;
}

absl::StatusOr<const StepReport*> EnginePair::Step(Instant now) {
  if (left_ != nullptr) Share(now);
  const bool both = left_ != nullptr && !left_->idle() && !current_->idle();
  const bool lefts_turn = both ? !left_had_turn_ : current_->idle();
  left_had_turn_ = lefts_turn;
  return (lefts_turn ? left_ : current_)->Step(now);
}

void EnginePair::SawMemory(const MemoryView& memory) {
  current_->SawMemory(memory);
  if (left_ != nullptr) left_->SawMemory(memory);
}

Instant EnginePair::TendWeights(Instant now) {
  const Instant next = current_->TendWeights(now);
  return left_ == nullptr ? next : std::min(next, left_->TendWeights(now));
}

WeightsReport EnginePair::weights() const {
  WeightsReport weights = current_->weights();
  AddTotals(retired_weights_, &weights);
  if (left_ != nullptr) AddTotals(left_->weights(), &weights);
  return weights;
}

void EnginePair::LimitPages(int pages, Instant now) {
  pages_ = pages;
  if (left_ != nullptr) {
    Share(now);
  } else {
    current_->LimitPages(pages, now);
  }
}

void EnginePair::MakeRoomOnLeft(const Request& request, Instant now) {
  Share(now, left_->scheduler().PagesAtMost(request));
}

void EnginePair::Share(Instant now, int64_t late) {
  const int all = std::max(0, pages_);
  const int missing = all - pages_;
  const Scheduler& left = left_->scheduler();
  const int64_t awaited = current_->scheduler().PagesAtMost() + awaited_;
  const int64_t share = std::max(all - awaited, int64_t{all} / 2);
  const int lefts = static_cast<int>(std::min(left.PagesAtMost() + late, share)) -
                    (missing > 0 ? std::min(missing, left_->weight_pages()) : 0);
  const auto limit = [now](Engine* engine, int pages, int* given) {
    if (*given != pages) engine->LimitPages(pages, now);
    *given = pages;
  };
  // More than it was given where the largest that runs needs that.
  const auto takes = [](const Engine& engine, int given) {
    return std::max(given, engine.pages_beside_weights());
  };
  // Who gets fewer goes first, and may keep more.
  if (lefts < takes(*left_, lefts_pages_)) {
    limit(left_, lefts, &lefts_pages_);
    limit(current_, pages_ - takes(*left_, lefts_pages_), &currents_pages_);
  } else {
    limit(current_, pages_ - lefts, &currents_pages_);
    limit(left_, std::min(lefts, pages_ - takes(*current_, currents_pages_)), &lefts_pages_);
  }
}

SchedulerStats EnginePair::stats() const {
  SchedulerStats stats = current_->scheduler().stats();
  AddTotals(retired_, &stats);
  if (left_ == nullptr) return stats;
  const SchedulerStats left = left_->scheduler().stats();
  AddTotals(left, &stats);
  stats.running += left.running;
  stats.waiting += left.waiting;
  stats.pages_total += left.pages_total;
  stats.pages_free += left.pages_free;
  stats.pages_used += left.pages_used;
  stats.pages_cached += left.pages_cached;
  return stats;
}

double EnginePair::oldest_wait_s(Instant now) const {
  const double wait = current_->scheduler().Pressure(now).oldest_wait_s;
  return left_ == nullptr ? wait : std::max(wait, left_->scheduler().Pressure(now).oldest_wait_s);
}

}  // namespace espalier
