// Perplexity of a text in windows that each start from an empty cache, side by side or overlapping.
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
  int stride = 0;  // from one window's first token to the next one's, in [1, tokens]

  // Its first token that is scored: those before are what it is scored by.
  int FirstScored(int window) const {
    return window == 0 || stride == tokens ? 1 : tokens - stride;
  }
};

// How `tokens` tokens are cut: `windows` windows of `window` tokens (0: all that the text fills;
// what is left over is not scored), one every `stride` tokens. With a stride of 0 or `window` they
// lie side by side and each is scored but for its first token; with a smaller one each but the
// first is scored over its last `stride` tokens, so that none is scored twice and all have
// something before them. A text shorter than one window is one window. InvalidArgument if the text
// has fewer windows than asked for, or fewer than 2 tokens, or the stride is longer than a window.
absl::StatusOr<WindowPlan> PlanWindows(int64_t tokens, int window, int windows, int stride = 0);

struct PerplexityResult {
  std::vector<double> nll_per_window;  // nats, summed over what is scored of each
  int64_t terms = 0;                   // tokens scored, of all windows
  double nll = 0;                      // total

  double mean() const { return nll / static_cast<double>(terms); }
  double perplexity() const;
};

// Log-probability of tokens first .. n - 1 of a window given the ones before, summed, nats; first
// >= 1.
using WindowScorer =
    std::function<absl::StatusOr<double>(std::span<const int32_t> window, int first)>;

// Scores the windows in order, calling progress(done, total) after each.
absl::StatusOr<PerplexityResult> MeasurePerplexity(
    std::span<const int32_t> tokens, const WindowPlan& plan, const WindowScorer& score,
    const std::function<void(int done, int total)>& progress);

// |value - reference| <= tolerance * |reference|; never true for what is not finite.
bool WithinTolerance(double value, double reference, double tolerance);

}  // namespace espalier
