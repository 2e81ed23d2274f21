#include "server/token_stream.h"

#include <utility>

namespace espalier {

bool TokenStream::Push(const SequenceOutput& output, Instant now) {
  std::lock_guard lock(mutex_);
  if (pending_.tokens.size() + output.tokens.size() > capacity_) return false;
  pending_.tokens.insert(pending_.tokens.end(), output.tokens.begin(), output.tokens.end());
  pending_.prompt_scores.insert(pending_.prompt_scores.end(), output.prompt_scores.begin(),
                                output.prompt_scores.end());
  StreamProgress& progress = pending_.progress;
  if (!output.tokens.empty()) {
    if (progress.first_token == kNever) progress.first_token = now;
    progress.last_token = now;
  }
  progress.first_scheduled = output.first_scheduled;
  progress.cached_tokens = output.cached_tokens;
  progress.preemptions = output.preemptions;
  progress.rung = output.rung;
  progress.rung_loss = output.rung_loss;
  progress.rung_tokens[output.rung] += static_cast<int32_t>(output.tokens.size());
  progress.told_loss += output.rung_loss * static_cast<double>(output.tokens.size());
  if (output.rung > 0 || progress.reason.empty()) progress.reason = output.reason;
  progress.stages = output.stages;
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
  out->progress = pending_.progress;
}

}  // namespace espalier
