#include "server/token_stream.h"

#include <utility>

namespace espalier {

bool TokenStream::Push(const SequenceOutput& output, Instant now) {
  std::lock_guard lock(mutex_);
  if (pending_.tokens.size() + output.tokens.size() > capacity_) return false;
  pending_.tokens.insert(pending_.tokens.end(), output.tokens.begin(), output.tokens.end());
  pending_.prompt_scores.insert(pending_.prompt_scores.end(), output.prompt_scores.begin(),
                                output.prompt_scores.end());
  if (!output.tokens.empty()) {
    StreamTimes& times = pending_.times;
    if (times.first_token == kNever) times.first_token = now;
    times.last_token = now;
  }
  if (output.first_scheduled != kNever) pending_.times.first_scheduled = output.first_scheduled;
  return true;
}

void TokenStream::End(StreamEnd end) {
  if (end.cause == StreamEnd::Cause::kStalled) stalled_.store(true, std::memory_order_release);
  std::lock_guard lock(mutex_);
  pending_.end = std::move(end);
}

void TokenStream::Drain(Pending* out) {
  out->tokens.clear();
  out->prompt_scores.clear();
  std::lock_guard lock(mutex_);
  out->tokens.swap(pending_.tokens);
  out->prompt_scores.swap(pending_.prompt_scores);
  out->end = std::exchange(pending_.end, std::nullopt);
  out->times = pending_.times;
}

}  // namespace espalier
