// Order statistics of small samples: what benchmarks and the load generator print.
#pragma once

#include <span>

namespace espalier {

// The p-th percentile, p in [0, 100], by linear interpolation between closest ranks (NumPy's
// default, Hyndman and Fan's type 7). 0 for an empty sample.
double Percentile(std::span<const double> sample, double p);

inline double Median(std::span<const double> sample) { return Percentile(sample, 50); }

}  // namespace espalier
