// One benchmark run: a batch of random prompts through Engine, Scheduler and Executor, exactly as a
// server would drive them, and what each kind of step took.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/executor.h"
#include "engine/scheduling/scheduler.h"
#include "policy/ladder.h"

namespace espalier {

struct BenchShape {
  int batch = 1;                 // requests that arrive together
  int prompt = 128;              // tokens of each, random ids
  int generate = 128;            // tokens drawn by each, greedy, at least 1
  std::vector<int> rungs = {0};  // of the requests, in turns
};

// Steps of one kind: those with prefill rows (some decode rows ride along) or decode rows only.
struct StepTotals {
  int steps = 0;
  int64_t tokens = 0;  // prefill rows, or decode rows
  double seconds = 0;
  PhaseTimes phases;

  double tokens_per_s() const { return seconds > 0 ? static_cast<double>(tokens) / seconds : 0; }
};

struct BenchResult {
  StepTotals prefill;
  StepTotals decode;
  double seconds = 0;  // first step to last token

  // Drawn tokens of all sequences per second of the whole run.
  double total_tokens_per_s(const BenchShape& shape) const {
    return double{1} * shape.batch * shape.generate / seconds;
  }
};

// What the engine is driven with; everything must outlive the run.
struct BenchEngine {
  Executor* executor = nullptr;
  KvGeometry geometry;
  const Ladder* ladder = nullptr;
  int vocabulary = 0;
  int step_rows = 512;
};

// Calls progress(done, total) in tokens of prompt and output.
absl::StatusOr<BenchResult> RunBench(
    const BenchEngine& engine, const BenchShape& shape, uint64_t seed,
    const std::function<void(int64_t done, int64_t total)>& progress);

}  // namespace espalier
