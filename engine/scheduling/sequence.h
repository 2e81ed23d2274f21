// A request's life in the engine: its tokens, how far they are computed, its pages.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "engine/scheduling/batch.h"
#include "engine/scheduling/request.h"

namespace espalier {

enum class FinishReason : uint8_t {
  kNone,
  kStop,       // a stop token, or a stop string found by the server
  kLength,     // max_tokens; a scored prompt is complete
  kCancelled,  // the caller went away or stalled
  kDeadline,   // its time ran out, queued or running
};

// "none", "stop", "length", "cancelled", "deadline".
std::string_view FinishReasonName(FinishReason reason);

struct Sequence {
  enum class State : uint8_t { kWaiting, kRunning };

  Request request;
  uint64_t arrival_order = 0;  // the oldest has the smallest; kept across preemptions
  State state = State::kWaiting;
  RungSet allowed = 1;          // by its bounds
  int rung = 0;                 // chosen at admission; policy may move it while it runs
  std::string_view reason;      // Policy::reason when it was admitted, or last made harder
  std::vector<int32_t> tokens;  // prompt, then output
  int computed = 0;             // tokens whose K and V lie in pages
  int scored = 0;               // prompt scores told, so that a recomputation does not repeat them
  int preemptions = 0;
  Instant waits_since{0};  // its arrival, or when it was last preempted
  int cached_tokens = 0;   // of the prompt, found in the prefix cache at the first admission
  int prefilled = 0;       // tokens before the first decode row since the last admission
  int lost = 0;            // computed when last preempted
  StageRows stages;        // rows computed, again after preemptions
  Instant first_scheduled = kNever;
  int table_length = 0;  // pages held in each layer that keeps K and V at this rung
  std::vector<std::vector<int32_t>> page_tables;  // [layers][table_length], other layers empty
  std::vector<int32_t> nodes;  // of the prefix cache: whose pages the first ones of each table are
  int node_rung = 0;           // that all of `computed` was computed at, while not `moved`
  bool moved = false;  // since its admission: K and V are of several rungs, and are not shared

  int size() const { return static_cast<int>(tokens.size()); }
  int prompt_tokens() const { return static_cast<int>(request.prompt.size()); }
  int output_tokens() const { return size() - prompt_tokens(); }
  // All but the last drawn token are computed: one row draws the next one.
  bool decoding() const { return output_tokens() > 0 && computed + 1 == size(); }
};

inline RequestTraits TraitsOf(const Sequence& sequence) {
  return {.allowed = sequence.allowed, .priority = sequence.request.priority};
}

// Service order: higher priority first, then the older one. Preemption takes from the other end.
inline bool ServedBefore(const Sequence& a, const Sequence& b) {
  if (a.request.priority != b.request.priority) return a.request.priority > b.request.priority;
  return a.arrival_order < b.arrival_order;
}

}  // namespace espalier
