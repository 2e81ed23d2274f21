// Turns sequences into batches: continuous batching, chunked prefill, paged KV, preemption.
//
// Integers only: no tensor, clock, thread or lock. The same calls with the same arguments give the
// same batches.
#pragma once

#include <deque>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "engine/scheduling/batch.h"
#include "engine/scheduling/page_pool.h"
#include "engine/scheduling/sequence.h"
#include "policy/policy.h"

namespace espalier {

// What the pool and the model can hold.
struct KvGeometry {
  int layers = 0;
  int pages = 0;         // of the whole pool, all layers
  int page_tokens = 16;
  int context = 0;       // longest sequence, tokens
};

struct SchedulerOptions {
  int max_batch_tokens = 512;   // rows of a step; decode rows first, prefill chunks fill the rest
  int max_sequences = 64;       // running at once
  int max_waiting = 256;        // queue bound, requests
  // Share of a newcomer's max_tokens that must fit beside what the running ones may still need;
  // 0 admits on the prompt alone (more preemption), 1 never preempts.
  double reserve_output = 0.5;
};

// What a step did, told by Commit and by Schedule's expiries.
struct SequenceOutput {
  RequestId id = 0;
  std::vector<TokenResult> tokens;         // drawn in this step; the stop token is left out
  std::vector<TokenResult> prompt_scores;  // for prompt_logprobs, in order
  FinishReason finish = FinishReason::kNone;
  // Filled when finished:
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int output_tokens = 0;
  int preemptions = 0;
  Instant first_scheduled = kNever;        // kNever: never left the queue
  int rung = 0;
};

struct SchedulerStats {
  int running = 0;
  int waiting = 0;
  int pages_total = 0;
  int pages_free = 0;
  int pages_used = 0;
  int pages_cached = 0;
  uint64_t preemptions = 0;        // since start
  uint64_t recomputed_tokens = 0;  // since start
};

class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, const KvGeometry& geometry, const Ladder& ladder,
            const Policy* policy);

  // Queues a request. InvalidArgument: empty prompt, duplicate id. OutOfRange: prompt + max_tokens
  // can never fit the context or the pool; the message says the length that would. 
  // ResourceExhausted: the queue is full.
  absl::Status Submit(Request request);

  // Ends a sequence in any state; its pages are free when this returns. False if unknown (finished
  // already). Not while a batch is out: the engine calls it between steps.
  bool Cancel(RequestId id);

  // Ends what is past its deadline (told in `expired`), admits, preempts and fills the next batch.
  // The batch is valid until Commit; empty if there is nothing to do.
  const Batch& Schedule(Instant now, std::vector<SequenceOutput>* expired);

  // Appends what the executor drew, ends sequences, gives their pages back.
  void Commit(const StepResult& result, Instant now, std::vector<SequenceOutput>* outputs);

  PressureReport Pressure(Instant now) const;
  SchedulerStats stats() const;
  bool idle() const;  // nothing waits, nothing runs

  // Longest prompt + output that the pool and the context can ever hold, tokens.
  int max_sequence_tokens() const;

  // Crashes unless free + used + cached = total, per layer, and tables agree with the pool.
  void CheckInvariants() const;
};

}  // namespace espalier
