// What updates the weights that stay: the mean's compensation, blocks of a Hessian, a whole one.
#include <algorithm>
#include <cmath>
#include <vector>

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <Eigen/LU>

#include "engine/pruning/second_moments.h"
#include "engine/pruning/weights/block_obs.h"
#include "engine/pruning/weights/column_moments.h"
#include "engine/pruning/weights/factor.h"
#include "engine/pruning/weights/mask.h"
#include "engine/pruning/weights/mean_compensation.h"
#include "engine/pruning/weights/sparsegpt.h"
#include "gtest/gtest.h"
#include "tests/engine/pruning/weights/weight_matrix.h"

namespace espalier {
namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Eigen::MatrixXd MomentsOf(const WeightMatrix& x) {
  const Eigen::MatrixXd values =
      Eigen::Map<const RowMajor>(x.values.data(), x.rows, x.cols).cast<double>();
  return values.transpose() * values / x.rows;
}

// U of the reference: the upper Cholesky factor of the damped inverse.
Eigen::MatrixXd ReferenceFactor(Eigen::MatrixXd moments, double damping) {
  moments.diagonal().array() += damping * moments.diagonal().mean();
  const Eigen::MatrixXd inverse = moments.inverse();
  return inverse.llt().matrixU();
}

TEST(ColumnMoments, AreSumsOverTokens) {
  const auto backend = TwoThreads();
  for (const int columns : {5, 64, 100, 192}) {
    WeightMatrix x = Inputs(37, columns, 1);
    ColumnMoments moments(columns, true);
    moments.Add(Matrix(x.values.data(), 30, columns), backend.get());
    moments.Add(Matrix(x.values.data() + 30 * columns, 7, columns), backend.get());
    EXPECT_EQ(moments.tokens(), 37);
    const Eigen::MatrixXd expected = MomentsOf(x);
    const std::vector<float> squares = moments.Squares(), mean = moments.Mean();
    const std::vector<float> around = moments.SquaresAroundMean();
    for (int j = 0; j < columns; ++j) {
      EXPECT_NEAR(squares[j] / (37 * expected(j, j)), 1, 1e-4);
      double sum = 0, off = 0;
      for (int t = 0; t < 37; ++t) sum += x.at(t, j);
      for (int t = 0; t < 37; ++t) off += std::pow(x.at(t, j) - sum / 37, 2);
      EXPECT_NEAR(mean[j], sum / 37, 1e-4 * std::sqrt(expected(j, j)));
      EXPECT_NEAR(around[j], off, 1e-3 * 37 * expected(j, j));
    }
    for (int b = 0; b < moments.block_count(); ++b) {
      const std::vector<float> block = moments.Block(b);
      const int width = moments.block_width(b), first = b * kMomentBlock;
      for (int i = 0; i < width; ++i) {
        for (int j = 0; j < width; ++j) {
          EXPECT_NEAR(
              block[i * width + j], expected(first + i, first + j),
              1e-4 * std::sqrt(expected(first + i, first + i) * expected(first + j, first + j)));
        }
      }
    }
  }
}

TEST(Factor, IsTheUpperCholeskyFactorOfTheInverse) {
  const auto backend = TwoThreads();
  for (const int n : {1, 63, 64, 65, 130, 320, 577}) {
    const WeightMatrix x = Inputs(3 * n + 10, n, 2);
    const Eigen::MatrixXd moments = MomentsOf(x);
    std::vector<float> factor(n * n);
    Eigen::Map<RowMajor>(factor.data(), n, n) = moments.cast<float>();
    ASSERT_TRUE(ToInverseFactor(n, 0.01, backend.get(), &factor).ok());
    const Eigen::MatrixXd expected = ReferenceFactor(moments, 0.01);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        ASSERT_NEAR(factor[i * n + j], expected(i, j), 2e-3 * expected(i, i)) << i << ' ' << j;
        if (j < i) {
          ASSERT_EQ(factor[i * n + j], 0);
        }
      }
    }
  }
}

TEST(Factor, ColumnsNeverSeenStandAlone) {
  const auto backend = TwoThreads();
  const int n = 70;
  WeightMatrix x = Inputs(300, n, 3);
  for (int t = 0; t < x.rows; ++t) x.values[t * n + 5] = x.values[t * n + 66] = 0;
  std::vector<float> factor(n * n);
  Eigen::Map<RowMajor>(factor.data(), n, n) = MomentsOf(x).cast<float>();
  ASSERT_TRUE(ToInverseFactor(n, 0.01, backend.get(), &factor).ok());
  for (const float value : factor) ASSERT_TRUE(std::isfinite(value));
  EXPECT_GT(factor[5 * n + 5], 0);
  for (int j = 6; j < n; ++j) EXPECT_EQ(factor[5 * n + j], 0);
}

TEST(Factor, SaysWhatIsNotPositiveDefinite) {
  const auto backend = TwoThreads();
  std::vector<float> matrix(100 * 100);
  for (int i = 0; i < 100; ++i) matrix[i * 100 + i] = i == 10 ? -1.0f : 1.0f;
  const absl::Status status = ToInverseFactor(100, 0.01, backend.get(), &matrix);
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_NE(status.message().find("columns 0 to 63"), std::string::npos) << status;
  std::vector<float> odd(4, NAN);
  EXPECT_FALSE(ToInverseFactor(2, 0.01, backend.get(), &odd).ok());
}

// The published loop, column by column, in fp64.
void SlowSparseGpt(const Pattern& pattern, const Eigen::MatrixXd& u, int block, bool shared,
                   Eigen::MatrixXd* w, Eigen::MatrixXi* pruned) {
  const int rows = static_cast<int>(w->rows()), columns = static_cast<int>(w->cols());
  *pruned = Eigen::MatrixXi::Zero(rows, columns);
  for (int begin = 0; begin < columns; begin += block) {
    const int end = std::min(begin + block, columns);
    if (!pattern.grouped() && shared) {
      std::vector<std::tuple<double, int, int>> scores;
      for (int i = 0; i < rows; ++i) {
        for (int j = begin; j < end; ++j) {
          scores.emplace_back(std::pow((*w)(i, j) / u(j, j), 2), i, j);
        }
      }
      std::ranges::sort(scores);
      for (int64_t k = 0; k < pattern.PrunedOf(static_cast<int64_t>(scores.size())); ++k) {
        (*pruned)(std::get<1>(scores[k]), std::get<2>(scores[k])) = 1;
      }
    }
    for (int j = begin; j < end; ++j) {
      if (pattern.grouped() && (j - begin) % pattern.group == 0) {
        const int size = std::min(pattern.group, end - j);
        for (int i = 0; i < rows; ++i) {
          std::vector<std::pair<double, int>> scores;
          for (int k = j; k < j + size; ++k) {
            scores.emplace_back(std::pow((*w)(i, k) / u(k, k), 2), k);
          }
          std::ranges::sort(scores);
          for (int k = 0; k < size - pattern.keep; ++k) (*pruned)(i, scores[k].second) = 1;
        }
      }
      for (int i = 0; i < rows; ++i) {
        if ((*pruned)(i, j) == 0) continue;
        const double error = (*w)(i, j) / u(j, j);
        for (int k = j; k < columns; ++k) (*w)(i, k) -= error * u(j, k);
        (*w)(i, j) = 0;
      }
    }
  }
}

class SparseGptOf : public ::testing::TestWithParam<const char*> {};

TEST_P(SparseGptOf, IsThePublishedLoop) {
  const Pattern pattern = *ParsePattern(GetParam());
  const auto backend = TwoThreads();
  const int rows = 48, columns = 300;
  const WeightMatrix dense(rows, columns, 4), x = Inputs(900, columns, 5);
  const Eigen::MatrixXd moments = MomentsOf(x);
  std::vector<float> factor(columns * columns);
  Eigen::Map<RowMajor>(factor.data(), columns, columns) = moments.cast<float>();
  ASSERT_TRUE(ToInverseFactor(columns, kSparseGptDamping, backend.get(), &factor).ok());
  WeightMatrix pruned = dense;
  ASSERT_TRUE(SparseGpt(pattern, factor, pruned.view(), backend.get()).ok());

  Eigen::MatrixXd slow =
      Eigen::Map<const RowMajor>(dense.values.data(), rows, columns).cast<double>();
  Eigen::MatrixXi mask;
  SlowSparseGpt(pattern, ReferenceFactor(moments, kSparseGptDamping),
                pattern.grouped() ? 128 / pattern.group * pattern.group : 128, true, &slow, &mask);
  int other = 0, zeros = 0;
  for (int i = 0; i < rows; ++i) {
    int row_other = 0;
    for (int j = 0; j < columns; ++j) {
      zeros += pruned.at(i, j) == 0 ? 1 : 0;
      row_other += (pruned.at(i, j) == 0) != (mask(i, j) != 0) ? 1 : 0;
    }
    other += row_other;
    // One mask that rounding turns over changes what follows in its row.
    for (int j = 0; j < columns && row_other == 0; ++j) {
      ASSERT_NEAR(pruned.at(i, j), slow(i, j), 2e-3) << i << ' ' << j;
    }
  }
  EXPECT_LE(other, rows * columns / 200);
  EXPECT_EQ(zeros, mask.sum());
  WeightMatrix wanda = dense;
  std::vector<float> squares;
  for (int j = 0; j < columns; ++j) squares.push_back(static_cast<float>(moments(j, j)));
  MaskWeights({.pattern = pattern}, {Metric::kWanda, squares, wanda.view(), backend.get()},
              wanda.view(), backend.get());
  EXPECT_LT(OutputError(dense, pruned, x), 0.7 * OutputError(dense, wanda, x));
}

INSTANTIATE_TEST_SUITE_P(Patterns, SparseGptOf, testing::Values("0.5", "2:4", "4:8", "3:5"),
                         [](const auto& each) {
                           std::string name = each.param;
                           std::ranges::replace_if(
                               name, [](char c) { return c == ':' || c == '.'; }, '_');
                           return "Of" + name;
                         });

TEST(BlockObs, IsSparseGptOfIndependentBlocks) {
  const auto backend = TwoThreads();
  for (const char* text : {"2:4", "4:8", "3:5", "0.5"}) {
    const Pattern pattern = *ParsePattern(text);
    const int rows = 32, columns = 150;  // two blocks and a short one, with a short group
    const WeightMatrix dense(rows, columns, 6);
    const WeightMatrix x = Inputs(600, columns, 7);
    ColumnMoments moments(columns, true);
    WeightMatrix copy = x;
    moments.Add(copy.view(), backend.get());
    const absl::StatusOr<BlockObs> obs = BlockObs::Create(moments, false, backend.get());
    ASSERT_TRUE(obs.ok()) << obs.status();
    WeightMatrix pruned = dense;
    obs->Prune(pattern, pruned.view(), backend.get());
    for (int i = 0; i < rows; ++i) {
      int64_t zeros = 0;
      for (int j = 0; j < columns; ++j) {
        ASSERT_TRUE(std::isfinite(pruned.at(i, j)));
        zeros += pruned.at(i, j) == 0 ? 1 : 0;
      }
      ASSERT_EQ(zeros, pattern.PrunedOf(columns)) << text << ", row " << i;
    }
    std::vector<float> squares = moments.Squares();
    WeightMatrix wanda = dense;
    MaskWeights({.pattern = pattern}, {Metric::kWanda, squares, wanda.view(), backend.get()},
                wanda.view(), backend.get());
    EXPECT_LT(OutputError(dense, pruned, x), 0.9 * OutputError(dense, wanda, x)) << text;
    if (!pattern.grouped() || pattern.group == 5) continue;
    // Each block for itself, by the published loop.
    const Eigen::MatrixXd whole = MomentsOf(x);
    const double damping = 0.01 * whole.diagonal().mean();
    int other = 0;
    for (int begin = 0; begin < columns; begin += kMomentBlock) {
      const int width = std::min(kMomentBlock, columns - begin);
      Eigen::MatrixXd block = whole.block(begin, begin, width, width);
      block.diagonal().array() += damping;
      const Eigen::MatrixXd u = Eigen::MatrixXd(block.inverse()).llt().matrixU();
      Eigen::MatrixXd slow = Eigen::Map<const RowMajor>(dense.values.data(), rows, columns)
                                 .middleCols(begin, width)
                                 .cast<double>();
      Eigen::MatrixXi mask;
      SlowSparseGpt(pattern, u, width, false, &slow, &mask);
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < width; ++j) {
          other += std::abs(pruned.at(i, begin + j) - slow(i, j)) > 2e-3 ? 1 : 0;
        }
      }
    }
    EXPECT_LE(other, rows * columns / 100) << text;
  }
}

TEST(BlockObs, OfNothingSeenIsMagnitude) {
  const auto backend = TwoThreads();
  WeightMatrix x(10, 70, 8), weights(4, 70, 9);
  std::ranges::fill(x.values, 0.0f);
  ColumnMoments moments(70, true);
  moments.Add(x.view(), backend.get());
  const absl::StatusOr<BlockObs> obs = BlockObs::Create(moments, false, backend.get());
  ASSERT_TRUE(obs.ok()) << obs.status();
  WeightMatrix by_magnitude = weights;
  obs->Prune(*ParsePattern("2:4"), weights.view(), backend.get());
  MaskWeights({.pattern = *ParsePattern("2:4")},
              {Metric::kMagnitude, {}, by_magnitude.view(), backend.get()}, by_magnitude.view(),
              backend.get());
  EXPECT_EQ(weights.values, by_magnitude.values);
}

// Where means outweigh deviations, centred blocks with the mean's compensation lose less than
// blocks of second moments with it; and inputs that are all mean, which leave nothing to factor but
// rounding, do no harm.
TEST(BlockObs, LeavesMeansToTheirCompensation) {
  const auto backend = TwoThreads();
  const int rows = 48, columns = 192;
  const WeightMatrix dense(rows, columns, 14);
  WeightMatrix x = Inputs(900, columns, 15);
  for (int i = 0; i < x.rows * columns; ++i) x.values[i] += 2;
  ColumnMoments moments(columns, true);
  moments.Add(x.view(), backend.get());
  const MeanCompensation compensation(moments, ConstMatrix(dense.values.data(), rows, columns),
                                      backend.get());
  double error[2];
  for (const bool centred : {false, true}) {
    WeightMatrix pruned = dense;
    const absl::StatusOr<BlockObs> obs = BlockObs::Create(moments, centred, backend.get());
    ASSERT_TRUE(obs.ok()) << obs.status();
    obs->Prune(*ParsePattern("2:4"), pruned.view(), backend.get());
    compensation.Apply(pruned.view(), backend.get());
    error[centred ? 1 : 0] = OutputError(dense, pruned, x);
  }
  EXPECT_LT(error[1], error[0]);

  for (float& value : x.values) value = 1000;
  ColumnMoments constant(columns, true);
  constant.Add(x.view(), backend.get());
  const absl::StatusOr<BlockObs> obs = BlockObs::Create(constant, true, backend.get());
  ASSERT_TRUE(obs.ok()) << obs.status();
  WeightMatrix pruned = dense;
  obs->Prune(*ParsePattern("2:4"), pruned.view(), backend.get());
  for (const float value : pruned.values) ASSERT_TRUE(std::isfinite(value));
}

TEST(MeanCompensation, GivesBackWhatTheMeanLost) {
  const auto backend = TwoThreads();
  const int rows = 40, columns = 192;
  const WeightMatrix dense(rows, columns, 10);
  WeightMatrix x = Inputs(800, columns, 11), pruned = dense;
  ColumnMoments moments(columns, false);
  moments.Add(x.view(), backend.get());
  const MeanCompensation compensation(moments, pruned.view(), backend.get());
  MaskWeights({.pattern = *ParsePattern("2:4")},
              {Metric::kWanda, moments.Squares(), pruned.view(), backend.get()}, pruned.view(),
              backend.get());
  WeightMatrix compensated = pruned;
  compensation.Apply(compensated.view(), backend.get());
  const std::vector<float> mean = moments.Mean();
  double lost = 0, still = 0;
  for (int i = 0; i < rows; ++i) {
    double before = 0, after = 0;
    for (int j = 0; j < columns; ++j) {
      ASSERT_EQ(compensated.at(i, j) == 0, pruned.at(i, j) == 0);
      before += (dense.at(i, j) - pruned.at(i, j)) * mean[j];
      after += (dense.at(i, j) - compensated.at(i, j)) * mean[j];
    }
    lost += before * before;
    still += after * after;
  }
  EXPECT_LT(still, 0.1 * lost);
  EXPECT_LT(OutputError(dense, compensated, x), OutputError(dense, pruned, x));
}

// For inputs whose columns are independent about their means the closed form is the optimum: no
// step along any weight that stays makes the loss of its own model smaller.
TEST(MeanCompensation, IsTheOptimumOfItsModel) {
  const auto backend = TwoThreads();
  const int columns = 24;
  const WeightMatrix dense(1, columns, 12);
  WeightMatrix x = Inputs(500, columns, 13), pruned = dense;
  ColumnMoments moments(columns, false);
  moments.Add(x.view(), backend.get());
  const MeanCompensation compensation(moments, pruned.view(), backend.get());
  for (int j = 0; j < columns; j += 2) pruned.values[j] = 0;
  compensation.Apply(pruned.view(), backend.get());
  const std::vector<float> mean = moments.Mean(), squares = moments.Squares();
  double damping = 0;
  for (const float square : squares) damping += 0.01 * square / 500 / columns;
  const auto loss = [&](const WeightMatrix& w) {
    double sum = 0, of_mean = 0;
    for (int j = 0; j < columns; ++j) {
      const double off = dense.at(0, j) - w.at(0, j);
      sum += off * off * (squares[j] / 500 - double{mean[j]} * mean[j] + damping);
      of_mean += off * mean[j];
    }
    return sum + of_mean * of_mean;
  };
  const double least = loss(pruned);
  for (int j = 1; j < columns; j += 2) {
    for (const float step : {-1e-3f, 1e-3f}) {
      WeightMatrix moved = pruned;
      moved.values[j] += step;
      EXPECT_GT(loss(moved), least) << j;
    }
  }
}

}  // namespace
}  // namespace espalier
