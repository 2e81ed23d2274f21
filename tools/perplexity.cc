#include "tools/perplexity.h"

#include <fmt/format.h>

#include <cmath>

namespace espalier {

absl::StatusOr<WindowPlan> PlanWindows(int64_t tokens, int window, int windows) {
  if (tokens < 2) {
    return absl::InvalidArgumentError(
        fmt::format("the text has {} tokens: nothing to score, at least 2 are needed", tokens));
  }
  if (tokens < window) window = static_cast<int>(tokens);
  const int64_t filled = tokens / window;
  if (filled < windows) {
    return absl::InvalidArgumentError(fmt::format(
        "the text has {} tokens: {} windows of {}, {} asked for", tokens, filled, window, windows));
  }
  return WindowPlan{.windows = windows > 0 ? windows : static_cast<int>(filled), .tokens = window};
}

double PerplexityResult::perplexity() const { return std::exp(mean()); }

absl::StatusOr<PerplexityResult> MeasurePerplexity(
    std::span<const int32_t> tokens, const WindowPlan& plan, const WindowScorer& score,
    const std::function<void(int done, int total)>& progress) {
  PerplexityResult result;
  for (int w = 0; w < plan.windows; ++w) {
    absl::StatusOr<double> logprob =
        score(tokens.subspan(static_cast<size_t>(w) * plan.tokens, plan.tokens));
    if (!logprob.ok()) return logprob.status();
    result.nll_per_window.push_back(-*logprob);
    result.nll -= *logprob;
    result.terms += plan.tokens - 1;
    progress(w + 1, plan.windows);
  }
  return result;
}

bool WithinTolerance(double value, double reference, double tolerance) {
  return std::abs(value - reference) <= tolerance * std::abs(reference);
}

}  // namespace espalier
