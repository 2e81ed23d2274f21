// The inner loops of weight pruning, compiled once for each instruction set.
//
// Scores are not negative; where it says so they are compared by their bits, which for such floats
// is the same order, with NaN above all. Of equal scores the one of the lower column is pruned
// first. Rows need no alignment.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/cpu_backend.h"

namespace espalier {

// Columns of a block of second moments, and the most that ObsArgs may have.
inline constexpr int kMomentBlock = 64;
inline constexpr int kObsWidth = 128;
// Rows that a pass of EWMA or of Optimal Brain Surgeon takes at once, one a lane.
inline constexpr int kEwmaRows = 16;
inline constexpr int kObsRows = 16;

inline constexpr float kFarStanding = 64;

// Sums of scores.
struct Saliency {
  double all = 0;
  double kept = 0;

  [[gnu::always_inline]] Saliency& operator+=(const Saliency& other) {
    all += other.all;
    kept += other.kept;
    return *this;
  }
};

// weights [rows <= kEwmaRows, columns], `stride` apart; column_weights [columns].
struct EwmaArgs {
  float* weights = nullptr;
  int64_t stride = 0;
  int rows = 0;
  int columns = 0;
  const float* column_weights = nullptr;
  float alpha = 0.125f;
  float beta = 0.125f;
  float k = 0;
  // If there is room, weights stay and (score - mean) / deviation + kFarStanding of each goes here,
  // at least 0 and at most twice that, column by column: [columns, kEwmaRows], where only the first
  // `rows` of each column mean something. What is below k + kFarStanding would be pruned.
  float* standing = nullptr;
};

// Rows of at most kObsWidth columns through Optimal Brain Surgeon: columns are pruned from left to
// right, and each one's error goes to those right of it.
struct ObsArgs {
  float* weights = nullptr;  // [rows <= kObsRows, width], `stride` apart
  int64_t stride = 0;
  int rows = 0;
  int width = 0;
  const float* factor = nullptr;  // [width, kObsWidth]: U, upper triangular, U^T U = H^-1
  // [rows, width], `pruned_stride` apart, or null: all but `keep` of each `group`, by w^2 / U_jj^2.
  const uint8_t* pruned = nullptr;
  int64_t pruned_stride = 0;
  int keep = 0;
  int group = 0;
  // [rows, width]: w_j / U_jj of what was pruned, 0 of what was kept; or null.
  float* errors = nullptr;
};

struct WeightLoops {
  // scores[j] = w[j]^2 * c[j]
  void (*score)(const float* w, const float* c, int n, float* scores);
  // Prunes two of every 4 (four of every 8) weights in place, by those scores; n is whole groups.
  Saliency (*mask_2_4)(float* w, const float* c, int n);
  Saliency (*mask_4_8)(float* w, const float* c, int n);
  // The largest that no more than `count` of n < 2^31 scores are below. `start`: where to begin
  // looking, or 0.
  float (*threshold_of)(const float* scores, int64_t n, int64_t count, float start);
  // w[j] = 0 for the `count` least scores of n < 2^31. `threshold`: where to begin looking, or 0;
  // then what was found.
  Saliency (*zero_least)(float* w, const float* scores, int64_t n, int64_t count, float* threshold);
  // A row of which some went, `original` before: of too many, by their scores original[j]^2 * c[j],
  // the best come back, of too few the least go too. `scores`: room for n.
  Saliency (*settle)(float* w, const float* original, const float* c, int n, int64_t count,
                     float* scores, float* threshold);
  Saliency (*ewma)(const EwmaArgs& args);
  // sums[j] += x[r, j] and squares[j] += x[r, j]^2 over rows, `stride` apart, of n columns.
  void (*add_moments)(const float* x, int64_t stride, int rows, int n, float* sums, float* squares);
  // sums [kMomentBlock, kMomentBlock] += X^T Y of x and y [rows, kMomentBlock], `stride` apart.
  void (*add_block)(const float* x, const float* y, int64_t stride, int rows, float* sums);
  void (*obs_rows)(const ObsArgs& args);
  double (*dot)(const float* a, const float* b, int n);
  // The sum of a[j] where w[j] is not 0; w[j] += scale * a[j] there.
  double (*sum_kept)(const float* w, const float* a, int n);
  void (*add_kept)(float* w, const float* a, float scale, int n);
  int64_t (*zeros)(const float* w, int64_t n);
  // The first that is an infinity or NaN; n if none is.
  int64_t (*first_not_finite)(const float* w, int64_t n);
};

// Of the best instruction set that this machine has; and of each, for tests.
const WeightLoops& BestWeightLoops();
const WeightLoops& WeightLoopsOf(Isa isa);

}  // namespace espalier
