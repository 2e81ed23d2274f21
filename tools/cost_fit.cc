#include "tools/cost_fit.h"

#include <fmt/format.h>

#include <chrono>
#include <fstream>
#include <random>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/model/pruning_file.h"
#include "engine/sim/cost_model.h"
#include "tools/figures.h"
#include "tools/interrupt.h"
#include "tools/machine.h"
#include "tools/progress.h"

namespace espalier {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMostPrompt = 384, kMostOutput = 48, kCalls = 32;
constexpr int kTurns = 2;

// Remembers what the last step was made of.
class WatchedExecutor final : public Executor {
 public:
  explicit WatchedExecutor(ModelExecutor* executor) : executor_(executor) {}
  absl::Status Execute(const Batch& batch, StepResult* result) override {
    shape_.Take(batch, executor_->ladder().size());
    return executor_->Execute(batch, result);
  }
  const StepContents& shape() const { return shape_; }

 private:
  ModelExecutor* const executor_;
  StepContents shape_;
};

// Calls of many lengths, a new one whenever one ends, so that prefill and decode rows meet in all
// proportions; then none, so that batches shrink. `rungs` in turns.
absl::Status Run(const CostFitOptions& options, int sequences, const std::vector<int>& rungs,
                 uint64_t seed, ModelExecutor* model, std::vector<TimedStep>* steps) {
  WatchedExecutor executor(model);
  FixedPolicy policy(0);  // not asked: requests name their rungs
  Engine engine({.max_batch_tokens = options.step_rows,
                 .max_sequences = sequences,
                 .max_waiting = kCalls,
                 .prefix_cache = false},
                model->kv_geometry(), model->ladder(), &executor, &policy);
  std::mt19937_64 random(seed);
  const int calls = std::min(kCalls, 4 * sequences);
  for (int i = 0; i < calls; ++i) {
    Request request;
    request.id = i + 1;
    request.prompt.resize(1 + random() % kMostPrompt);
    for (int32_t& token : request.prompt) {
      token = static_cast<int32_t>(random() % model->config().vocabulary);
    }
    request.sampling.temperature = 0;
    request.stop.max_tokens = 2 + static_cast<int>(random() % (kMostOutput - 1));
    request.bounds.rung = rungs[i % rungs.size()];
    if (absl::Status status = engine.Submit(std::move(request)); !status.ok()) return status;
  }
  const Clock::time_point begin = Clock::now();
  while (!engine.idle()) {
    const Clock::time_point before = Clock::now();
    const absl::StatusOr<const StepReport*> step = engine.Step(before - begin);
    if (!step.ok()) return step.status();
    if (Interrupt::raised()) return absl::CancelledError("interrupted");
    if ((*step)->decode_rows + (*step)->prefill_rows == 0) continue;
    steps->push_back({.shape = executor.shape(),
                      .seconds = std::chrono::duration<double>(Clock::now() - before).count()});
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status FitStepCosts(const CostFitOptions& options) {
  const Interrupt interrupt([] {});
  absl::StatusOr<LocalModel> model = LoadLocalModel(
      options.model, kCalls * PagedTokens(kMostPrompt + kMostOutput), options.step_rows);
  if (!model.ok()) return model.status();
  ModelExecutor* const executor = model->executor.get();
  if (!options.ladder.empty()) {
    absl::StatusOr<CalibratedLadder> ladder = OpenLadder(options.ladder, *model->file);
    if (!ladder.ok()) return ladder.status();
    const absl::Status status = executor->SetLadder(ladder->ladder, *ladder->channels);
    if (!status.ok()) return status;
  }
  const int rungs = executor->ladder().size();
  CpuWatch watch;
  std::vector<TimedStep> steps;
  const std::vector<int> batches = {1, 4, 12, 32};
  Progress bar("timing steps");
  int64_t done = 0;
  const auto total = static_cast<int64_t>((rungs + 1) * batches.size() * kTurns);
  std::vector<int> all;
  for (int rung = 0; rung < rungs; ++rung) all.push_back(rung);
  for (int turn = 0; turn < kTurns; ++turn) {
    for (int rung = 0; rung <= rungs; ++rung) {
      for (const int batch : batches) {
        const absl::Status status = Run(options, batch, rung < rungs ? std::vector<int>{rung} : all,
                                        options.seed + turn, executor, &steps);
        if (!status.ok()) return status;
        bar.Update(++done, total);
      }
    }
  }
  CostFit fit;
  if (!FitCosts(steps, rungs, &fit)) {
    return absl::InternalError("the steps timed do not tell the costs apart");
  }
  const std::string summary = fmt::format(
      "{} steps of {} rungs, {}, {} threads: R^2 {:.4f}, a step is off by {:.1f} % in the median, "
      "the worst kind of step by {:.0f} %",
      steps.size(), rungs, MachineName(), model->threads, fit.r_squared, 100 * fit.median_error,
      100 * fit.worst_error);
  std::ofstream file(options.out);
  file << FormatCosts(fit.model, summary);
  file.close();
  if (!file) return absl::UnavailableError(fmt::format("{}: cannot be written", options.out));
  fmt::print("{}{}\n", FormatCosts(fit.model, summary), options.out);
  if (const std::optional<double> others = watch.OthersShare(); others.value_or(0) > 0.05) {
    fmt::print(stderr, "warning: other processes took {:.0f} % of the cores: costs are too high\n",
               100 * *others);
  }
  if (options.figures.empty()) return absl::OkStatus();
  return WriteFigures(options.figures, {{"costs_r_squared", fit.r_squared},
                                        {"costs_median_error", fit.median_error},
                                        {"costs_worst_error", fit.worst_error}});
}

}  // namespace espalier
