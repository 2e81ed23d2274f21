#include "tools/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace espalier {

double Percentile(std::span<const double> sample, double p) {
  if (sample.empty()) return 0;
  std::vector<double> sorted(sample.begin(), sample.end());
  std::sort(sorted.begin(), sorted.end());
  const double rank = std::clamp(p, 0.0, 100.0) / 100 * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(rank);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], rank - static_cast<double>(below));
}

}  // namespace espalier
