#include "tools/perplexity.h"

#include <fmt/format.h>

#include <cmath>

namespace espalier {

absl::StatusOr<WindowPlan> PlanWindows(int64_t tokens, int window, int windows, int stride) {
  if (tokens < 2) {
    return absl::InvalidArgumentError(
        fmt::format("the text has {} tokens: nothing to score, at least 2 are needed", tokens));
  }
  if (stride > window) {
    return absl::InvalidArgumentError(
        fmt::format("a stride of {} leaves out tokens between windows of {}", stride, window));
  }
  if (tokens < window) window = static_cast<int>(tokens);
  if (stride == 0 || stride > window) stride = window;
  const int64_t filled = 1 + (tokens - window) / stride;
  if (filled < windows) {
    return absl::InvalidArgumentError(fmt::format(
        "the text has {} tokens: {} windows of {}, {} asked for", tokens, filled, window, windows));
  }
  return WindowPlan{.windows = windows > 0 ? windows : static_cast<int>(filled),
                    .tokens = window,
                    .stride = stride};
}

double PerplexityResult::perplexity() const { return std::exp(mean()); }

absl::StatusOr<PerplexityResult> MeasurePerplexity(
    std::span<const int32_t> tokens, const WindowPlan& plan, const WindowScorer& score,
    const std::function<void(int done, int total)>& progress) {
  PerplexityResult result;
  for (int w = 0; w < plan.windows; ++w) {
    const int first = plan.FirstScored(w);
    absl::StatusOr<double> logprob =
        score(tokens.subspan(static_cast<size_t>(w) * plan.stride, plan.tokens), first);
    if (!logprob.ok()) return logprob.status();
    result.nll_per_window.push_back(-*logprob);
    result.nll -= *logprob;
    result.terms += plan.tokens - first;
    progress(w + 1, plan.windows);
  }
  return result;
}

bool WithinTolerance(double value, double reference, double tolerance) {
  return std::abs(value - reference) <= tolerance * std::abs(reference);
}

}  // namespace espalier
