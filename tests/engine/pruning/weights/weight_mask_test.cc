#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

#include "engine/pruning/weights/mask.h"
#include "gtest/gtest.h"
#include "tests/engine/pruning/weights/weight_matrix.h"

namespace espalier {
namespace {

constexpr Metric kMetrics[] = {Metric::kLScore,    Metric::kWanda,     Metric::kRia,
                               Metric::kObdDamped, Metric::kMagnitude, Metric::kFluctuation};

std::vector<float> SomeSquares(int columns) {
  std::vector<float> squares;
  for (int j = 0; j < columns; ++j) squares.push_back(0.5f + static_cast<float>(j * 37 % 101));
  return squares;
}

// The slow way: of each group, or row, the least by (score, column).
std::set<std::pair<int, int>> LeastBySorting(const Pattern& pattern, const WeightMatrix& weights,
                                             const ColumnWeights& columns) {
  std::set<std::pair<int, int>> pruned;
  std::vector<float> room(weights.cols);
  for (int i = 0; i < weights.rows; ++i) {
    const float* const c = columns.Of(i, room);
    const int group = pattern.grouped() ? pattern.group : weights.cols;
    for (int begin = 0; begin < weights.cols; begin += group) {
      const int size = std::min(group, weights.cols - begin);
      const int64_t count =
          pattern.grouped() ? std::max(size - pattern.keep, 0) : pattern.PrunedOf(weights.cols);
      std::vector<std::pair<float, int>> scores;
      for (int j = begin; j < begin + size; ++j) {
        scores.emplace_back(weights.at(i, j) * weights.at(i, j) * c[j], j);
      }
      std::ranges::sort(scores);
      for (int64_t k = 0; k < count; ++k) pruned.emplace(i, scores[k].second);
    }
  }
  return pruned;
}

std::set<std::pair<int, int>> ZerosOf(const WeightMatrix& weights) {
  std::set<std::pair<int, int>> zeros;
  for (int i = 0; i < weights.rows; ++i) {
    for (int j = 0; j < weights.cols; ++j) {
      if (weights.at(i, j) == 0) zeros.emplace(i, j);
    }
  }
  return zeros;
}

class MaskOf : public ::testing::TestWithParam<std::tuple<const char*, int>> {};

// Groups, whole and short, and rows of awkward lengths: as sorting has it, for every metric.
TEST_P(MaskOf, IsWhatSortingFinds) {
  const auto& [text, columns] = GetParam();
  const Pattern pattern = *ParsePattern(text);
  const auto backend = TwoThreads();
  for (const Metric metric : kMetrics) {
    const WeightMatrix dense(37, columns, 1);
    WeightMatrix pruned = dense;
    const ColumnWeights weights(metric, SomeSquares(columns), pruned.view(), backend.get());
    const Saliency saliency =
        MaskWeights({.pattern = pattern}, weights, pruned.view(), backend.get());
    EXPECT_EQ(ZerosOf(pruned), LeastBySorting(pattern, dense, weights))
        << kMetricNames[static_cast<int>(metric)];
    EXPECT_EQ(ZerosOf(pruned).size(), 37u * pattern.PrunedOf(columns));
    double all = 0, kept = 0;
    std::vector<float> room(columns);
    for (int i = 0; i < dense.rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        const double score = double{dense.at(i, j)} * dense.at(i, j) * weights.Of(i, room)[j];
        all += score;
        if (pruned.at(i, j) != 0) kept += score;
      }
    }
    EXPECT_NEAR(saliency.all, all, 1e-4 * all);
    EXPECT_NEAR(saliency.kept, kept, 1e-4 * all);
  }
}

INSTANTIATE_TEST_SUITE_P(Patterns, MaskOf,
                         testing::Combine(testing::Values("2:4", "4:8", "1:4", "3:5", "0.5", "0.3",
                                                          "0.9"),
                                          testing::Values(1, 3, 16, 30, 64, 99, 576)),
                         [](const auto& each) {
                           std::string name = std::get<0>(each.param);
                           std::ranges::replace_if(
                               name, [](char c) { return c == ':' || c == '.'; }, '_');
                           return "Of" + name + "In" + std::to_string(std::get<1>(each.param));
                         });

TEST(Mask, LoopsOfEveryInstructionSetAgree) {
  const int columns = 200;
  const WeightMatrix dense(1, columns, 3);
  const std::vector<float> squares = SomeSquares(columns);
  for (const Isa isa : SupportedIsas()) {
    const WeightLoops& loops = WeightLoopsOf(isa);
    const WeightLoops& portable = WeightLoopsOf(Isa::kPortable);
    std::vector<float> a = dense.values, b = dense.values;
    loops.mask_2_4(a.data(), squares.data(), columns);
    portable.mask_2_4(b.data(), squares.data(), columns);
    EXPECT_EQ(a, b) << IsaName(isa);
    loops.mask_4_8(a.data(), squares.data(), columns);
    portable.mask_4_8(b.data(), squares.data(), columns);
    EXPECT_EQ(a, b) << IsaName(isa);
    float from = 0, other_from = 0;
    loops.zero_least(a.data(), squares.data(), columns, 99, &from);
    portable.zero_least(b.data(), squares.data(), columns, 99, &other_from);
    EXPECT_EQ(a, b) << IsaName(isa);
    a[77] = NAN;
    EXPECT_EQ(loops.first_not_finite(a.data(), columns), 77) << IsaName(isa);
    EXPECT_EQ(loops.first_not_finite(b.data(), columns), columns) << IsaName(isa);
  }
}

// Scores of few kinds, whole groups of zeros among them: the lower column leaves.
TEST(Mask, TiesInGroupsLeaveFromTheLeft) {
  std::mt19937 random(21);
  for (const Isa isa : SupportedIsas()) {
    const WeightLoops& loops = WeightLoopsOf(isa);
    for (int turn = 0; turn < 200; ++turn) {
      const int columns = 8 * (1 + static_cast<int>(random() % 40)), kinds = 1 + turn % 7;
      WeightMatrix dense(1, columns, 1);
      for (float& value : dense.values) {
        value = (random() % 2 == 0 ? 1.0f : -1.0f) * static_cast<float>(random() % kinds);
      }
      const std::vector<float> ones(columns, 1.0f);
      const ColumnWeights same(Metric::kMagnitude, {}, dense.view(), nullptr);
      for (const char* text : {"2:4", "4:8"}) {
        WeightMatrix pruned = dense, expected = dense;
        const auto mask = text[0] == '2' ? loops.mask_2_4 : loops.mask_4_8;
        const Saliency saliency = mask(pruned.values.data(), ones.data(), columns);
        double all = 0, kept = 0;
        for (const auto& [i, j] : LeastBySorting(*ParsePattern(text), dense, same)) {
          expected.values[j] = 0;
        }
        for (int j = 0; j < columns; ++j) {
          all += dense.values[j] * dense.values[j];
          kept += expected.values[j] * expected.values[j];
        }
        ASSERT_EQ(pruned.values, expected.values) << IsaName(isa) << ' ' << text << ' ' << turn;
        EXPECT_NEAR(saliency.all, all, 1e-4 * all);
        EXPECT_NEAR(saliency.kept, kept, 1e-4 * all);
      }
    }
  }
}

// (a) of the notes' tests: inputs that are all alike leave the weights to decide.
TEST(Metric, LScoreOfConstantInputsRanksAsMagnitude) {
  const auto backend = TwoThreads();
  const WeightMatrix dense(16, 96, 5);
  WeightMatrix by_l = dense, by_magnitude = dense;
  const std::vector<float> squares(96, 3.25f);
  const Pattern half = *ParsePattern("0.5");
  MaskWeights({.pattern = half}, {Metric::kLScore, squares, by_l.view(), backend.get()},
              by_l.view(), backend.get());
  MaskWeights({.pattern = half}, {Metric::kMagnitude, {}, by_l.view(), backend.get()},
              by_magnitude.view(), backend.get());
  EXPECT_EQ(by_l.values, by_magnitude.values);
}

// (b): a column with all the energy stays, whatever its weights.
TEST(Metric, LScoreNeverPrunesTheOnlyColumnSeen) {
  const auto backend = TwoThreads();
  WeightMatrix weights(16, 96, 6);
  for (int i = 0; i < weights.rows; ++i) weights.values[i * 96 + 42] *= 1e-2f;
  std::vector<float> squares(96, 0.0f);
  squares[42] = 7;
  MaskWeights({.pattern = *ParsePattern("2:4")},
              {Metric::kLScore, squares, weights.view(), backend.get()}, weights.view(),
              backend.get());
  for (int i = 0; i < weights.rows; ++i) EXPECT_NE(weights.at(i, 42), 0) << i;
}

TEST(Metric, RiaIsItsFormula) {
  const auto backend = TwoThreads();
  WeightMatrix weights(5, 7, 7);
  const std::vector<float> squares = SomeSquares(7);
  const ColumnWeights columns(Metric::kRia, squares, weights.view(), backend.get());
  std::vector<float> room(7);
  for (int i = 0; i < 5; ++i) {
    for (int j = 0; j < 7; ++j) {
      double row = 0, column = 0;
      for (int o = 0; o < 7; ++o) row += std::abs(weights.at(i, o));
      for (int o = 0; o < 5; ++o) column += std::abs(weights.at(o, j));
      const double w = std::abs(weights.at(i, j));
      const double ria = (w / row + w / column) * std::pow(std::sqrt(squares[j]), 0.5);
      EXPECT_NEAR(w * w * columns.Of(i, room)[j] / (ria * ria), 1, 1e-5);
    }
  }
}

TEST(Mask, ColumnsNeverSeenGoFirstAndNothingIsNotANumber) {
  const auto backend = TwoThreads();
  for (const Metric metric : {Metric::kWanda, Metric::kRia, Metric::kLScore}) {
    for (const Selection selection : {Selection::kExact, Selection::kEwma}) {
      WeightMatrix weights(40, 64, 8);
      for (int i = 0; i < 40; ++i) weights.values[i * 64 + 3] = 0;  // RIA: a column of zeros
      std::vector<float> squares(64, 0.0f);
      for (int j = 40; j < 64; ++j) squares[j] = 1;
      if (metric == Metric::kLScore) squares.assign(64, 0);  // S = 0: as magnitude
      MaskWeights({.pattern = *ParsePattern("0.5"), .selection = selection},
                  {metric, squares, weights.view(), backend.get()}, weights.view(), backend.get());
      for (int i = 0; i < 40; ++i) {
        int zeros = 0;
        for (int j = 0; j < 64; ++j) {
          EXPECT_TRUE(std::isfinite(weights.at(i, j)));
          zeros += weights.at(i, j) == 0 ? 1 : 0;
          if (metric != Metric::kLScore && selection == Selection::kExact && j >= 40) {
            EXPECT_NE(weights.at(i, j), 0);
          }
        }
        // The zero of column 3 may be beside those pruned.
        EXPECT_GE(zeros, 32);
        EXPECT_LE(zeros, 33);
      }
    }
  }
}

// One row of the published recurrence, as the notes define it.
std::vector<bool> EwmaByTheBook(const std::vector<float>& scores, double alpha, double beta,
                                double k) {
  const size_t first = std::min<size_t>(scores.size(), 16);
  double m = 0, d = 0;
  for (size_t j = 0; j < first; ++j) m += scores[j] / static_cast<double>(first);
  for (size_t j = 0; j < first; ++j) d += std::abs(scores[j] - m) / static_cast<double>(first);
  std::vector<bool> pruned;
  for (const float score : scores) {
    pruned.push_back(score < m + k * d);
    const double e = std::abs(score - m);
    d = (1 - beta) * d + beta * e;
    m = (1 - alpha) * m + alpha * score;
  }
  return pruned;
}

// (d): 16 rows in lanes, in tiles, are the recurrence of each; and so is where scores stand.
TEST(Ewma, LanesAreTheSequentialRecurrence) {
  for (const Isa isa : SupportedIsas()) {
    for (const int rows : {1, 5, 16}) {
      for (const int columns : {1, 7, 16, 64, 65, 200}) {
        const WeightMatrix dense(rows, columns, 9);
        const std::vector<float> squares = SomeSquares(columns);
        const float k = -0.3f;
        std::vector<float> pruned = dense.values, standing(columns * kEwmaRows);
        EwmaArgs args{.weights = pruned.data(),
                      .stride = columns,
                      .rows = rows,
                      .columns = columns,
                      .column_weights = squares.data(),
                      .k = k};
        WeightLoopsOf(isa).ewma(args);
        std::vector<float> untouched = dense.values;
        args.weights = untouched.data();
        args.standing = standing.data();
        WeightLoopsOf(isa).ewma(args);
        EXPECT_EQ(untouched, dense.values);
        int odd = 0;
        for (int r = 0; r < rows; ++r) {
          std::vector<float> scores;
          for (int j = 0; j < columns; ++j) {
            scores.push_back(dense.at(r, j) * dense.at(r, j) * squares[j]);
          }
          const std::vector<bool> book = EwmaByTheBook(scores, 0.125, 0.125, k);
          for (int j = 0; j < columns; ++j) {
            odd += (pruned[r * columns + j] == 0) != book[j] ? 1 : 0;
            odd += (standing[j * kEwmaRows + r] < k + kFarStanding) != book[j] ? 1 : 0;
          }
        }
        // Rounding may decide for a score on the very threshold.
        EXPECT_LE(odd, rows * columns / 500) << IsaName(isa) << ' ' << rows << 'x' << columns;
      }
    }
  }
}

// (e): the calibrated k is near, strict is exact.
TEST(Ewma, ReachesTheShareAskedFor) {
  const auto backend = TwoThreads();
  for (const double share : {0.3, 0.5, 0.7}) {
    for (const float alpha : {0.125f, 0.02f}) {
      const WeightMatrix dense(576, 1536, 10);
      const std::vector<float> squares = SomeSquares(1536);
      MaskOptions options{.pattern = {.sparsity = share},
                          .selection = Selection::kEwma,
                          .strict = false,
                          .alpha = alpha,
                          .beta = alpha};
      WeightMatrix pruned = dense;
      const ColumnWeights columns(Metric::kWanda, squares, pruned.view(), backend.get());
      MaskWeights(options, columns, pruned.view(), backend.get());
      EXPECT_NEAR(static_cast<double>(ZerosOf(pruned).size()) / (576 * 1536), share, 0.005);

      options.strict = true;
      const WeightMatrix loose = pruned;
      pruned = dense;
      const Saliency saliency = MaskWeights(options, columns, pruned.view(), backend.get());
      EXPECT_LT(saliency.kept, saliency.all);
      for (int i = 0; i < 576; ++i) {
        int64_t zeros = 0, before = 0, both = 0;
        for (int j = 0; j < 1536; ++j) {
          zeros += pruned.at(i, j) == 0 ? 1 : 0;
          before += loose.at(i, j) == 0 ? 1 : 0;
          both += pruned.at(i, j) == 0 && loose.at(i, j) == 0 ? 1 : 0;
        }
        ASSERT_EQ(zeros, options.pattern.PrunedOf(1536)) << "row " << i;
        ASSERT_EQ(both, std::min(zeros, before)) << "repaired further than needed, row " << i;
      }
    }
  }
}

TEST(Mask, ExactSelectionKeepsNoLessThanEwma) {
  const auto backend = TwoThreads();
  const WeightMatrix dense(64, 576, 11);
  const std::vector<float> squares = SomeSquares(576);
  double kept[2];
  for (const Selection selection : {Selection::kExact, Selection::kEwma}) {
    WeightMatrix pruned = dense;
    const Saliency saliency = MaskWeights({.pattern = {.sparsity = 0.5}, .selection = selection},
                                          {Metric::kWanda, squares, pruned.view(), backend.get()},
                                          pruned.view(), backend.get());
    kept[static_cast<int>(selection)] = saliency.kept / saliency.all;
  }
  EXPECT_GT(kept[0], kept[1]);
  EXPECT_GT(kept[1], 0.9);
}

TEST(Mask, WholeMatrixHasOneThreshold) {
  const auto backend = TwoThreads();
  WeightMatrix weights(10, 50, 12);
  for (int j = 0; j < 50; ++j) weights.values[j] *= 1e-3f;  // row 0 is all small
  MaskWeights({.pattern = {.sparsity = 0.5}, .whole_matrix = true},
              {Metric::kMagnitude, {}, weights.view(), backend.get()}, weights.view(),
              backend.get());
  EXPECT_EQ(ZerosOf(weights).size(), 250u);
  for (int j = 0; j < 50; ++j) EXPECT_EQ(weights.at(0, j), 0);
}

// Ties, values far apart, starting points far off: always the count, and always the least.
TEST(ZeroLeast, IsExactForAwkwardScores) {
  std::mt19937 random(13);
  for (int turn = 0; turn < 300; ++turn) {
    const int n = 1 + static_cast<int>(random() % 700), kinds = 1 + static_cast<int>(random() % 9);
    std::vector<float> scores(n), weights(n, 1.0f);
    for (float& score : scores) {
      score = turn % 3 == 0   ? static_cast<float>(random() % kinds)
              : turn % 3 == 1 ? std::ldexp(1.0f, static_cast<int>(random() % 200) - 100)
                              : static_cast<float>(random() % 100000) * 1e-3f;
    }
    const int64_t count = random() % (n + 1);
    float threshold = turn % 5 == 0 ? 1e30f : turn % 5 == 1 ? 1e-30f : 0;
    const Saliency saliency =
        BestWeightLoops().zero_least(weights.data(), scores.data(), n, count, &threshold);
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, {}, [&](int j) { return scores[j]; });
    double kept = 0;
    for (int64_t k = 0; k < n; ++k) {
      ASSERT_EQ(weights[order[k]] == 0, k < count) << "turn " << turn << ", " << k << " of " << n;
      if (k >= count) kept += scores[order[k]];
    }
    EXPECT_NEAR(saliency.kept, kept, 1e-4 * saliency.all);
  }
}

}  // namespace
}  // namespace espalier
