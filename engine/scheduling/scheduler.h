// Turns sequences into batches: continuous batching, chunked prefill, paged KV, preemption.
//
// Integers only: no tensor, clock, thread or lock. The same calls with the same arguments give the
// same batches.
//
// Service order is priority, descending, then arrival. A step is filled in this order:
//   1. Expiry. What is past its deadline ends and gives its pages back before anything is planned.
//   2. Decode rows, one for each decoding sequence, in service order. A row that enters a new page
//      and finds none free preempts the last sequence in service order, itself if need be. A
//      preempted sequence returns its pages, waits at its old place and later computes prompt and
//      output anew; tokens that were drawn stay drawn.
//   3. Prefill chunks in service order, of running and of newly admitted sequences.
//
// Admission is by full length: a newcomer takes the pages of its whole prompt at once, so a prefill
// never stalls half-way, and only if its promise fits beside everyone else's:
//   promise(s)  = pages(size + ceil(reserve_output * (max_tokens - output_tokens)))
//   admitted if   promise(head) - pages it finds in use
//                   <= limit - used - sum over running of (promise(s) - pages held by s)
//   pages(n)    = ceil(n / tokens of a page at the rung) * layers that keep K and V at the rung
// With reserve_output = 1 growth never fails and nothing is preempted, unless the limit falls. When
// nothing runs the head is admitted unasked, and the pool grows for it if it was accepted when
// there were more: no page is in use then.
//
// Only the head of the queue is tried. Nobody overtakes a request that waits for room, whatever the
// size, so at equal priority none starves; the price is room left empty while a long one waits.
//
// Pages are shared from the step on that filled them: a full page enters the prefix cache at
// Commit, whether its tokens were asked or drawn, and whoever is admitted with the same tokens
// before it and in it, at the same rung, starts behind it. The last token is always computed, since
// its row draws the next one; so are the rows whose scores are wanted. Two that filled the same
// page in one step keep one of them. A page leaves its cache only when somebody needs one and none
// is free.
//
// Rungs are chosen at admission, and anew before each step: a request's bounds hold always, one
// that named its rung stays there. A sequence that was preempted may come back at any rung.
//
// The first running sequence in service order has rows in every step (unless newcomers of higher
// priority took what decodes leave): decoding, since a sequence comes to decode only by a row of
// the step before, so there are never more decodes than rows; prefilling, since nobody behind it
// got a row, and with it a decode, before its prompt was done. And it is never preempted.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/scheduling/batch.h"
#include "engine/scheduling/kv_pages.h"
#include "engine/scheduling/rung_chooser.h"
#include "engine/scheduling/sequence.h"
#include "engine/scheduling/traffic_meter.h"
#include "policy/policy.h"

namespace espalier {

struct SchedulerOptions {
  int max_batch_tokens = 128;  // >= 1; rows of a step; newcomers wait while decodes take them all
  int max_sequences = 64;      // >= 1; running at once
  int max_waiting = 256;  // >= 0; queue bound for newcomers, requests; the preempted come on top
  // In [0, 1]: share of the output still to come that a promise counts. 0 admits on what is there
  // already (more preemption), 1 never preempts.
  double reserve_output = 0.5;
  bool prefix_cache = true;  // full pages are kept and shared
};

// What a step did to one sequence, told by Commit and by Schedule's expiries.
struct SequenceOutput {
  RequestId id = 0;
  std::vector<TokenResult> tokens;         // drawn in this step; the stop token is left out
  std::vector<TokenResult> prompt_scores;  // for prompt_logprobs, in order, each told once
  FinishReason finish = FinishReason::kNone;
  // As of this step:
  int prompt_tokens = 0;
  int cached_tokens = 0;  // of the prompt, found in the prefix cache
  int output_tokens = 0;
  int preemptions = 0;
  Instant first_scheduled = kNever;  // kNever: never left the queue
  int rung = 0;                      // of this step's rows
  double rung_loss = 0;              // what it is taken to lose, nats per token
  // Policy::reason when it was admitted, or last moved to a harder rung for it; "memory" where it
  // fits only elsewhere, "none" if others are pruned and it is not; or "weights", while those of
  // the rung that it would be at are not in memory. Valid as long as the policy.
  std::string_view reason;
  StageRows stages;  // rows computed, again after preemptions
};

struct SchedulerStats {
  int running = 0;
  int waiting = 0;
  int pages_total = 0;
  int pages_free = 0;
  int pages_used = 0;
  int pages_cached = 0;
  uint64_t preemptions = 0;        // since start
  uint64_t recomputed_tokens = 0;  // since start; whose K and V were gone after a preemption
  int wanted_rung = 0;             // Policy::wanted
  std::string_view reason;         // Policy::reason
  // Policy::refuses_behind_s: newcomers of this priority and below would wait behind somebody who
  // has for so long. Nothing: there is nobody, or nobody of theirs.
  std::optional<int> refused_priority;
  uint64_t rung_moves = 0;  // since start, of running sequences
  // Since start, of requests at their first admission; those that want scores do not ask.
  uint64_t prefix_queries = 0;  // prompt tokens
  uint64_t prefix_hits = 0;     // of these, found in the prefix cache
  uint64_t prefix_evicted_pages = 0;
  StageRows stages;  // since start, rows computed
};

// Who needs which rungs' weights, and what there must be beside them.
struct RungUse {
  RungSet running = 0;  // that running sequences are at
  RungSet wished = 0;   // that they are to be at, weights in memory or not, and who is next
  RungSet head = 0;     // that who is next may be served at
  int64_t pages_used = 0;
  int64_t pages_of_head = 0;  // promised to who is next
  int64_t pages_needed = 0;   // used, and promised to all who wait
};

// What the machine's memory was seen as, in shares.
struct MemoryView {
  Instant at = kNever;  // kNever: nobody looks
  double free = 1;      // of what the process may hold
  double foreign = 0;   // of the machine's, held by others
};

class Scheduler {
 public:
  // `policy` must outlive the scheduler. Crashes on options or a geometry out of range, or on a
  // ladder of another number of layers.
  Scheduler(const SchedulerOptions& options, const KvGeometry& geometry, const Ladder& ladder,
            Policy* policy);

  // Queues a request. InvalidArgument: empty prompt, an id that is live, max_tokens that ask for
  // nothing. OutOfRange: prompt + max_tokens can never fit; the message says the length that would.
  // ResourceExhausted: the queue is full, or the pages there may be now cannot hold it.
  absl::Status Submit(Request request);

  // What Schedule or LimitPages, whichever was last, made of pages: to be done before the batch, or
  // before pages move.
  std::span<const PagePacking> packings() const { return packings_; }

  // Ends a sequence in any state; it holds no page when this returns. False if unknown (finished
  // already). Not while a batch is out: the engine calls it between steps.
  bool Cancel(RequestId id);

  // Ends what is past its deadline (told in `expired`), admits, preempts and fills the next batch.
  // The batch is valid, and out, until Commit or Discard; empty, and not out, if there is nothing
  // to do. Nothing of a sequence with deadline <= now is in it.
  const Batch& Schedule(Instant now, std::vector<SequenceOutput>* expired);

  // Appends what the executor drew, shares the pages that are full, ends sequences, gives their
  // pages back. `result` has one token for each logit row of the batch.
  void Commit(const StepResult& result, std::vector<SequenceOutput>* outputs);

  // Clears what earlier steps told, and keeps its memory for the tokens of later ones.
  void Recycle(std::vector<SequenceOutput>* outputs);

  // The batch that is out was not computed: every sequence stands where it stood before it.
  void Discard();

  // There may be so many pages: newcomers go by that. The pool has as many, or what the largest
  // running sequence needs alone, so that it ends. While it has more: what is only cached goes, who
  // holds more than there may be moves to a rung at which it does not, where the limit has fallen
  // the policy is shown the want and may move more of them to less KV, the last in service order
  // are preempted, and what is left beyond moves: the pairs (from, to) of pages to copy, before
  // anything else is computed. Not while a batch is out.
  std::vector<std::pair<int32_t, int32_t>> LimitPages(int pages, Instant now);
  int pages_total() const { return pool().total(); }
  int page_limit() const { return rungs_.limit(); }

  // KV pages of a whole sequence at the rung that takes least, of those that bounds and policy
  // leave it; at rung 0; and of all that live at rung 0.
  int64_t LeastPages(const Request& request) const { return rungs_.LeastPages(request); }
  int64_t PagesAtMost(const Request& request) const { return pages_.Pages(request, 0); }
  int64_t PagesAtMost() const;

  // Rungs whose weights are in memory; the others are served to nobody. At first all. False, and
  // nothing is changed, if somebody runs who cannot come to one of these now; else whoever ran at
  // none of them does, and packings() are to be done before anything else. So true for any set that
  // has all that are run at. Not while a batch is out. Whoever waits and may have none of them
  // waits on, and those behind.
  bool ServeRungs(RungSet rungs);
  RungUse rung_use() const;
  // The pages there could be for who has no rung but this one, [rungs], where that is more than
  // there may be: who fits beside the weights of some rungs alone is accepted, and served at these.
  void set_most_pages(std::span<const int> pages) { rungs_.set_most_pages(pages); }

  // What rungs lose, [rungs], nats per token, in place of what their price tags say: for bounds,
  // for the policy, and as answers are told. Not while anybody is live, who was let in by the
  // others.
  void SetLosses(std::span<const double> losses);

  // The machine's memory was looked at.
  void SawMemory(const MemoryView& memory) { memory_ = memory; }
  // So many came since this was last told, whether they were let in or not.
  void CountArrivals(int requests) { traffic_.CountArrivals(requests); }

  PressureReport Pressure(Instant now) const;
  SchedulerStats stats() const;
  bool idle() const { return sequences_.empty(); }  // nothing waits, nothing runs

  // Longest prompt + output that the context and the pool, all of it, can hold at rung 0, tokens.
  int max_sequence_tokens() const;

  // Crashes unless free + used + cached = total in every layer, every page is free, of one sequence
  // or of one node of the prefix cache, whose users all computed what it holds, and queues, tables
  // and counts agree. O(pages + sequences * layers).
  void CheckInvariants() const;

 private:
  using Queue = std::vector<Sequence*>;  // in service order

  // The steps of Schedule.
  void Expire(Instant now, std::vector<SequenceOutput>* expired);
  void AddDecodes(Instant now);
  void AddPrefills(Instant now);

  const PagePool& pool() const { return pages_.pool(); }

  // Running sequences to the rungs that the policy now wants. What shapes their KV may only shrink:
  // no rung that keeps K and V of more layers, or at more bits.
  void MoveRunning();
  // Stays where it is if pages have to be copied, and none are available.
  void MoveTo(Sequence* sequence, int rung);

  // Moves the head of the queue to running_[place]; false if it has to wait. `unpromised` is free
  // and cached pages less what the running were promised beyond what they hold.
  bool AdmitHead(size_t place, Instant now, int64_t* unpromised);
  // Of the first in service order who has waited for as long as the policy lets newcomers wait
  // behind: those before them are served sooner.
  std::optional<int> RefusedPriority(Instant now) const;

  // It is to be served at the rung: notes why, and tells the policy.
  void NoteChoice(Sequence* sequence, int rung);
  SequenceOutput Describe(const Sequence& sequence, FinishReason finish) const;

  // Gives `sequence` pages for all its tokens, preempting those after it. False if it was the last
  // in service order and had to go itself.
  bool Grow(Sequence* sequence, Instant now);
  void Preempt(Sequence* sequence, Instant now);
  void AddSpan(Sequence* sequence, bool decode, bool admitted);
  StageRows Stages(const BatchSpan& span, const ProbeUse& probe) const;
  FinishReason Append(const TokenResult& drawn, Sequence* sequence, SequenceOutput* output);

  void Insert(Sequence* sequence, Queue* queue);
  void Remove(Sequence* sequence, Queue* queue);
  void End(Sequence* sequence);  // destroys it

  int64_t PagesPromised(const Sequence& sequence) const {
    return PagesPromised(sequence, sequence.rung);
  }
  int64_t PagesPromised(const Sequence& sequence, int rung) const;

  const SchedulerOptions options_;
  Ladder ladder_;
  Policy* const policy_;

  KvPages pages_;
  RungChooser rungs_;
  TrafficMeter traffic_;
  std::unordered_map<RequestId, std::unique_ptr<Sequence>>
      sequences_;  // never walked for decisions
  Queue waiting_;
  Queue running_;
  uint64_t arrivals_ = 0;
  Instant next_deadline_ = kNever;  // no live sequence has an earlier one
  MemoryView memory_;
  std::optional<int> refused_priority_;  // SchedulerStats's
  uint64_t preemptions_ = 0;
  uint64_t recomputed_tokens_ = 0;
  uint64_t rung_moves_ = 0;
  uint64_t prefix_queries_ = 0;
  uint64_t prefix_hits_ = 0;
  StageRows stages_;

  std::vector<PagePacking> packings_;
  Batch batch_;                                         // empty unless out
  std::vector<Sequence*> scheduled_;                    // [batch_.spans]
  std::vector<std::vector<TokenResult>> spare_tokens_;  // empty, with room
};

}  // namespace espalier
