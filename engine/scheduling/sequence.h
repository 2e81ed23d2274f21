// A request's life in the engine: its tokens, how far they are computed, its pages.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "engine/scheduling/request.h"

namespace espalier {

enum class FinishReason : uint8_t {
  kNone,
  kStop,       // a stop token, or a stop string found by the server
  kLength,     // max_tokens, or the context is full
  kCancelled,  // the caller went away or stalled
  kDeadline,   // its time ran out, queued or running
};

// "stop", "length", "cancelled", "deadline".
std::string_view FinishReasonName(FinishReason reason);

struct Sequence {
  enum class State : uint8_t { kWaiting, kRunning };

  Request request;
  uint64_t arrival_order = 0;   // the oldest has the smallest
  State state = State::kWaiting;
  int rung = 0;
  std::vector<int32_t> tokens;  // prompt, then output
  int computed = 0;             // tokens whose K and V lie in pages
  int scheduled = 0;            // rows of the step in flight
  int preemptions = 0;
  Instant first_scheduled = kNever;
  std::vector<std::vector<int32_t>> page_tables;  // [layers][pages]

  int prompt_tokens() const { return static_cast<int>(request.prompt.size()); }
  int output_tokens() const { return static_cast<int>(tokens.size()) - prompt_tokens(); }
  // All but the last token are computed: the next step draws the next one.
  bool decoding() const { return computed + 1 == static_cast<int>(tokens.size()) && output_tokens() > 0; }
};

}  // namespace espalier
