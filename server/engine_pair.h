// The engine that serves newcomers and, while a model is being replaced, the one on which those
// who came before finish: steps in turns, within one limit of KV pages. Engine thread.
#pragma once

#include <cstdint>

#include "engine/engine.h"

namespace espalier {

class EnginePair {
 public:
  // `engine` must outlive its use.
  explicit EnginePair(Engine* engine)
      : current_(engine), pages_(engine->scheduler().pages_total()) {}

  Engine* current() const { return current_; }
  Engine* left() const { return left_; }  // null: there is one engine
  bool idle() const { return current_->idle() && (left_ == nullptr || left_->idle()); }

  // From now on `engine`, which has nothing to do, serves newcomers. Not while there is another.
  void Replace(Engine* engine, Instant now);
  // The one before is done with: the pages are all the other's. What it counted is kept.
  void Retire(Instant now);

  // Whether a newcomer has to wait for pages that the engine before holds.
  bool MustWait(const Request& request) const;
  // KV pages that those who wait so may need.
  void set_awaited_pages(int64_t pages) { awaited_ = pages; }
  int64_t PagesOf(const Request& request) const;

  // A step of an engine that has something to do, in turns.
  absl::StatusOr<const StepReport*> Step(Instant now);

  // As Engine::SawMemory, TendWeights, lost, weights, of both; what came back since start is told
  // of those retired, too.
  void SawMemory(const MemoryView& memory);
  Instant TendWeights(Instant now);
  const absl::Status& lost() const {
    return left_ == nullptr || !current_->lost().ok() ? current_->lost() : left_->lost();
  }
  WeightsReport weights() const;

  // As Engine::LimitPages, of both together.
  void LimitPages(int pages, Instant now);
  // Two engines: gives each what all its requests may come to hold, the one before so many pages
  // more as are `late`, or half if that is too much. Where weights have to leave, those of the one
  // before do first: nobody new comes to them.
  void Share(Instant now, int64_t late = 0);

  // For a newcomer to the one before, which may have fewer than it needs.
  void MakeRoomOnLeft(const Request& request, Instant now);

  // Of both, and of those retired.
  SchedulerStats stats() const;
  double oldest_wait_s(Instant now) const;

 private:
  Engine* current_;
  Engine* left_ = nullptr;
  bool left_had_turn_ = false;
  int pages_;  // both may have, as Engine::LimitPages
  // As last limited, so that nothing is done where nothing changes.
  int currents_pages_ = 0, lefts_pages_ = 0;
  int64_t awaited_ = 0;
  SchedulerStats retired_;  // totals since start
  WeightsReport retired_weights_;
};

}  // namespace espalier
