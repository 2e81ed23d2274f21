#include "engine/pruning/weights/column_moments.h"

#include <algorithm>
#include <functional>

#include "engine/pruning/weights/loops.h"

namespace espalier {

ColumnMoments::ColumnMoments(int columns, bool blocks)
    : columns_(columns), sums_(columns), squares_(columns) {
  if (blocks) {
    products_.resize(static_cast<size_t>(block_count()) * kMomentBlock * kMomentBlock);
  }
}

int ColumnMoments::block_count() const { return (columns_ + kMomentBlock - 1) / kMomentBlock; }

int ColumnMoments::block_width(int b) const {
  return std::min(kMomentBlock, columns_ - b * kMomentBlock);
}

void ColumnMoments::Add(ConstMatrix x, Backend* backend) {
  const WeightLoops& loops = BestWeightLoops();
  const auto add = [&](int b) {
    const int begin = b * kMomentBlock, width = block_width(b);
    float sums[kMomentBlock] = {}, squares[kMomentBlock] = {};
    loops.add_moments(x.data + begin, x.stride, x.rows, width, sums, squares);
    for (int j = 0; j < width; ++j) {
      sums_[begin + j] += sums[j];
      squares_[begin + j] += squares[j];
    }
    if (products_.empty()) return;
    float* const products = products_.data() + int64_t{b} * kMomentBlock * kMomentBlock;
    if (width == kMomentBlock) {
      loops.add_block(x.data + begin, x.data + begin, x.stride, x.rows, products);
      return;
    }
    std::vector<float> padded(static_cast<size_t>(x.rows) * kMomentBlock);
    for (int r = 0; r < x.rows; ++r) {
      std::copy_n(x.row(r) + begin, width, padded.data() + int64_t{r} * kMomentBlock);
    }
    loops.add_block(padded.data(), padded.data(), kMomentBlock, x.rows, products);
  };
  backend->ParallelFor(block_count(), std::cref(add));  // a function of its own would be allocated
  tokens_ += x.rows;
}

void ColumnMoments::Restore(int64_t tokens, std::span<const double> sums,
                            std::span<const double> squares) {
  tokens_ = tokens;
  sums_.assign(sums.begin(), sums.end());
  squares_.assign(squares.begin(), squares.end());
}

std::vector<float> ColumnMoments::Squares() const { return {squares_.begin(), squares_.end()}; }

std::vector<float> ColumnMoments::SquaresAroundMean() const {
  std::vector<float> squares(columns_);
  for (int j = 0; tokens_ > 0 && j < columns_; ++j) {
    const double of_mean = sums_[j] * sums_[j] / static_cast<double>(tokens_);
    squares[j] = static_cast<float>(std::max(squares_[j] - of_mean, 0.0));
  }
  return squares;
}

std::vector<float> ColumnMoments::Mean() const {
  std::vector<float> mean(columns_);
  for (int j = 0; tokens_ > 0 && j < columns_; ++j) {
    mean[j] = static_cast<float>(sums_[j] / static_cast<double>(tokens_));
  }
  return mean;
}

std::vector<float> ColumnMoments::Block(int b) const {
  const int width = block_width(b);
  const float scale = tokens_ == 0 ? 0 : 1 / static_cast<float>(tokens_);
  const float* const products = products_.data() + int64_t{b} * kMomentBlock * kMomentBlock;
  std::vector<float> block(static_cast<size_t>(width) * width);
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) block[i * width + j] = scale * products[i * kMomentBlock + j];
  }
  return block;
}

}  // namespace espalier
