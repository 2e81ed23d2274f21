#include "tools/self_text.h"

#include <algorithm>
#include <random>
#include <utility>

#include "engine/engine.h"
#include "policy/policy.h"

namespace espalier {

absl::StatusOr<std::vector<std::vector<int32_t>>> MakeUpTexts(
    ModelExecutor* executor, int count, int length, int batch, uint64_t seed,
    const std::function<bool(int64_t done, int64_t total)>& progress) {
  const FixedPolicy dense(0);
  Engine engine({.max_batch_tokens = std::max(batch, 64),
                 .max_sequences = batch,
                 .max_waiting = count,
                 .prefix_cache = false},
                executor->kv_geometry(), executor->ladder(), executor, &dense);
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> token(0, executor->config().vocabulary - 1);
  std::vector<std::vector<int32_t>> texts(count);
  for (int i = 0; i < count; ++i) {
    texts[i].push_back(token(random));
    Request request;
    request.id = i + 1;
    request.prompt = texts[i];
    request.sampling.temperature = 1;
    request.sampling.seed = seed + static_cast<uint64_t>(i);
    request.stop.max_tokens = length - 1;
    const absl::Status status = engine.Submit(std::move(request));
    if (!status.ok()) return status;
  }
  int64_t done = 0;
  while (!engine.idle()) {
    const absl::StatusOr<const StepReport*> step = engine.Step(Instant{0});
    if (!step.ok()) return step.status();
    for (const SequenceOutput& output : (*step)->outputs) {
      for (const TokenResult& drawn : output.tokens) texts[output.id - 1].push_back(drawn.token);
      done += static_cast<int64_t>(output.tokens.size());
    }
    if (!progress(done, int64_t{count} * (length - 1))) return absl::CancelledError("interrupted");
  }
  return texts;
}

}  // namespace espalier
