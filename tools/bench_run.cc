#include "tools/bench_run.h"

#include <chrono>
#include <random>
#include <utility>

#include "engine/engine.h"
#include "policy/policy.h"

namespace espalier {
namespace {

using Clock = std::chrono::steady_clock;

Request RandomRequest(RequestId id, const BenchShape& shape, int vocabulary,
                      std::mt19937_64* random) {
  Request request;
  request.id = id;
  std::uniform_int_distribution<int32_t> token(0, vocabulary - 1);
  for (int i = 0; i < shape.prompt; ++i) request.prompt.push_back(token(*random));
  request.sampling.temperature = 0;
  request.stop.max_tokens = shape.generate;  // and no stop token: nothing ends early
  return request;
}

}  // namespace

absl::StatusOr<BenchResult> RunBench(
    const BenchEngine& setup, const BenchShape& shape, uint64_t seed,
    const std::function<void(int64_t done, int64_t total)>& progress) {
  FixedPolicy policy(0);  // not asked: requests name their rungs
  Engine engine({.max_batch_tokens = setup.step_rows,
                 .max_sequences = shape.batch,
                 .max_waiting = shape.batch,
                 .prefix_cache = false},  // what is timed is computed
                setup.geometry, *setup.ladder, setup.executor, &policy);
  std::mt19937_64 random(seed);
  for (int i = 0; i < shape.batch; ++i) {
    Request request = RandomRequest(i + 1, shape, setup.vocabulary, &random);
    request.bounds.rung = shape.rungs[i % shape.rungs.size()];
    const absl::Status status = engine.Submit(std::move(request));
    if (!status.ok()) return status;
  }

  BenchResult result;
  // The last drawn token of a sequence is never a row.
  const int64_t total = int64_t{shape.batch} * (shape.prompt + shape.generate - 1);
  int64_t done = 0;
  const Clock::time_point begin = Clock::now();
  Clock::time_point last = begin;
  while (!engine.idle()) {
    const absl::StatusOr<const StepReport*> step = engine.Step(last - begin);
    if (!step.ok()) return step.status();
    const StepReport& report = **step;
    const Clock::time_point now = Clock::now();
    StepTotals& totals = report.prefill_rows > 0 ? result.prefill : result.decode;
    ++totals.steps;
    totals.tokens += report.prefill_rows > 0 ? report.prefill_rows : report.decode_rows;
    totals.seconds += std::chrono::duration<double>(now - last).count();
    totals.phases += report.phases;
    last = now;
    done += report.prefill_rows + report.decode_rows;
    progress(done, total);
  }
  result.seconds = std::chrono::duration<double>(last - begin).count();
  return result;
}

}  // namespace espalier
