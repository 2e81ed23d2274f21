// An Executor without a model: draws known tokens and finds fault with every batch it is given.
//
// It keeps a model of the KV memory: each slot of each page holds a hash of all that would shape K
// and V there: rung, layer, and the tokens up to it with how they were computed. A batch that reads
// what its own text would not have left there, or writes where another reads, is refused, so a page
// freed too early, a recomputation that skips a token or a prefix shared in error shows at once.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "engine/executor.h"
#include "engine/scheduling/scheduler.h"
#include "policy/ladder.h"

namespace espalier {

class PuppetExecutor final : public Executor {
 public:
  static constexpr int kVocabulary = 1000;

  // `geometry` and `ladder` as given to the scheduler.
  PuppetExecutor(const KvGeometry& geometry, const Ladder& ladder);

  // Internal with the fault of the batch, if it has one; Unavailable when told to fail.
  absl::Status Execute(const Batch& batch, StepResult* result) override;

  void PackPages(std::span<const PagePacking> packings) override;
  void FitPages(std::span<const std::pair<int32_t, int32_t>> moves, int pages) override;

  // From now on `outputs` are the first tokens drawn for `id`; after them, as for an id that was
  // told nothing, a hash of (id, output index).
  void Tell(RequestId id, std::vector<int32_t> outputs) { told_[id] = std::move(outputs); }

  // The executions numbered `step` (from 0) and later fail.
  void FailFrom(int step) { fail_from_ = step; }

  // The whole answer to `request`: what must come out however it was scheduled.
  std::vector<int32_t> Answer(const Request& request) const;

  // The log-probability reported for the token at `position` of request `id`: a hash in [-8, 0).
  static float Logprob(RequestId id, int position);

  int steps() const { return steps_; }
  int packings() const { return packings_; }
  uint64_t digest() const { return digest_; }  // of every field of all batches so far

 private:
  struct Slot {
    int layer = -1;  // never written
    int position = 0;
    uint64_t history = 0;
  };

  int32_t Draw(RequestId id, int index, std::span<const int32_t> banned) const;
  // Of a position, from the one before: of its token, and of how it was computed.
  static uint64_t History(uint64_t before, int32_t token, int how);
  // At which rung, and whether by what decode rows keep and prefill rows do not.
  int How(const BatchSpan& span) const;
  // At four bits a page holds twice as many.
  int page_tokens(const BatchSpan& span) const {
    return geometry_.page_tokens * (ladder_.rung(span.rung).int4_kv ? 2 : 1);
  }
  int64_t most_tokens() const { return int64_t{2} * geometry_.page_tokens; }
  Slot& SlotOf(const BatchSpan& span, int layer, int position);
  absl::Status CheckShape(const Batch& batch);
  absl::Status CheckPages(const Batch& batch);
  absl::Status WriteAndRead(const Batch& batch);
  absl::Status CheckLogits(const Batch& batch);
  void Digest(const Batch& batch);

  KvGeometry geometry_;
  Ladder ladder_;
  std::unordered_map<RequestId, std::vector<int32_t>> told_;
  std::vector<Slot> memory_;     // [pages * most_tokens()]
  std::vector<int> read_step_;   // [pages]: last step in which a span named the page
  std::vector<int> write_step_;  // [pages]: last step in which rows wrote to it
  std::unordered_map<RequestId, std::vector<int>> how_;  // [positions]
  int fail_from_ = -1;
  int steps_ = 0;
  int packings_ = 0;
  uint64_t digest_ = 0;
};

}  // namespace espalier
