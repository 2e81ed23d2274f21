// One request's way back: a bounded buffer of tokens from the engine thread to its reader.
//
// The engine thread never waits here. A reader that lets more than `capacity` tokens pile up has
// stalled: the stream refuses the rest, and the engine thread ends the request.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/scheduling/scheduler.h"

namespace espalier {

// Why no more tokens will come.
struct StreamEnd {
  enum class Cause : uint8_t {
    kFinished,  // see `reason`
    kRefused,   // by the scheduler, see `error`
    kStalled,   // nobody read
    kLost,      // the device failed, see `error`
    kShutdown,  // the drain's time ran out
  };
  Cause cause = Cause::kFinished;
  FinishReason reason = FinishReason::kNone;
  absl::Status error;
};

// How far the request has come, as of its last step.
struct StreamProgress {
  Instant first_scheduled = kNever;  // kNever: it has not come to that
  Instant first_token = kNever;
  Instant last_token = kNever;
  int cached_tokens = 0;
  int preemptions = 0;
  int rung = 0;
  double rung_loss = 0;                              // SequenceOutput's
  std::array<int32_t, kMostRungs> rung_tokens = {};  // drawn at each
  double told_loss = 0;                              // nats, of all that were drawn
  std::string_view reason;  // SequenceOutput's, when a token was last pruned
  StageRows stages;
};

// Told, on a writer thread, that a stream has something to drain.
class StreamReader {
 public:
  virtual ~StreamReader() = default;
  virtual void OnReady() = 0;
};

class TokenStream {
 public:
  static constexpr size_t kUnbounded = SIZE_MAX;

  // What waits: swapped out by Drain, so that two buffers go back and forth without allocation.
  struct Pending {
    std::vector<TokenResult> tokens;
    std::vector<TokenResult> prompt_scores;
    std::optional<StreamEnd> end;  // nothing follows it
    StreamProgress progress;
  };

  TokenStream(RequestId id, size_t capacity, std::weak_ptr<StreamReader> reader)
      : id_(id), capacity_(capacity), reader_(std::move(reader)) {}

  RequestId id() const { return id_; }

  // Engine thread. Appends a step's tokens, or nothing and false if they do not fit.
  bool Push(const SequenceOutput& output, Instant now);
  // Engine thread; once, after the last Push.
  void End(StreamEnd end);

  // Moves what waits to `out`, which must be as an earlier call left it, or new.
  void Drain(Pending* out);

  bool stalled() const { return stalled_.load(std::memory_order_acquire); }

 private:
  friend class ReadyQueue;

  const RequestId id_;
  const size_t capacity_;  // tokens
  const std::weak_ptr<StreamReader> reader_;
  std::atomic<bool> queued_{false};  // in the ready queue
  std::atomic<bool> stalled_{false};
  std::mutex mutex_;
  Pending pending_;
};

}  // namespace espalier
