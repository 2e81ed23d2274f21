// Perplexity of a text in windows that each start from an empty cache.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace espalier {

struct WindowPlan {
  int windows = 0;
  int tokens = 0;  // of each window
};

// How `tokens` tokens are cut: `windows` consecutive windows of `window` tokens (0: all that the
// text fills; what is left over is not scored). A text shorter than one window is one window.
// InvalidArgument if the text has fewer windows than asked for, or fewer than 2 tokens.
absl::StatusOr<WindowPlan> PlanWindows(int64_t tokens, int window, int windows);

struct PerplexityResult {
  std::vector<double> nll_per_window;  // nats, summed over positions 1 .. window - 1
  int64_t terms = 0;                   // windows * (window - 1)
  double nll = 0;                      // total

  double mean() const { return nll / static_cast<double>(terms); }
  double perplexity() const;
};

// Log-probability of tokens 1 .. n - 1 of a window given the ones before, summed, nats.
using WindowScorer = std::function<absl::StatusOr<double>(std::span<const int32_t> window)>;

// Scores the windows in order, calling progress(done, total) after each.
absl::StatusOr<PerplexityResult> MeasurePerplexity(
    std::span<const int32_t> tokens, const WindowPlan& plan, const WindowScorer& score,
    const std::function<void(int done, int total)>& progress);

// |value - reference| <= tolerance * |reference|; never true for what is not finite.
bool WithinTolerance(double value, double reference, double tolerance);

}  // namespace espalier
