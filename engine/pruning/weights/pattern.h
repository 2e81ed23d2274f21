// Where zeros may lie in a pruned matrix: any share of its weights, or N kept of every M in a row.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace espalier {

// Groups of N:M lie along a row from its first weight on, as sparse tensor cores want them. A row
// that does not end with a whole group ends with dummies, which count as pruned already: a short
// group keeps at most N too, so one of N weights or fewer keeps all.
struct Pattern {
  double sparsity = 0.5;  // share of zeros in whole groups
  int keep = 0;           // N; 0: no groups
  int group = 0;          // M

  bool grouped() const { return group > 0; }
  // Weights to prune of a row of `columns`.
  int64_t PrunedOf(int64_t columns) const;
  std::string name() const;  // "0.5", "2:4"

  bool operator==(const Pattern&) const = default;
};

inline constexpr int kMaxGroup = 64;

// "0.5" (above 0, below 1) or "2:4" (1 <= N < M <= kMaxGroup); none if it is neither.
std::optional<Pattern> ParsePattern(std::string_view text);

}  // namespace espalier
