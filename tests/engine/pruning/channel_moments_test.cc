// Second moments of a server's channels: those that SecondMoments sums of the same rows.
#include "engine/pruning/channel_moments.h"

#include <random>
#include <vector>

#include "engine/pruning/second_moments.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

TEST(ChannelMoments, AreSecondMomentsOfTheListedRows) {
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  for (const int channels : {24, 64, 230}) {  // one tile and less, several and a part of one
    const int stride = channels + 3;
    ChannelMoments moments(2, channels);
    SecondMoments want(channels, 0, backend.get());
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.3f);
    for (const std::vector<int>& rows :
         {std::vector<int>{1, 2, 5, 6, 31}, std::vector<int>{}, std::vector<int>{0}}) {
      std::vector<float> hidden(stride * 32), listed;
      for (float& value : hidden) value = normal(random);
      for (const int row : rows) {
        listed.insert(listed.end(), hidden.begin() + row * stride,
                      hidden.begin() + row * stride + channels);
      }
      moments.Add(1, ConstMatrix(hidden.data(), 32, channels, stride), rows, {}, backend.get());
      const int count = static_cast<int>(rows.size());
      ASSERT_TRUE(want.Add(ConstMatrix(listed.data(), count, channels), {}).ok());
    }
    EXPECT_EQ(moments.layer(1).tokens, want.tokens());
    EXPECT_EQ(moments.tokens(), 0) << "of a layer that nothing was added to";
    EXPECT_EQ(moments.least_layer(), 0);
    const std::vector<float> got = moments.Mean(1), expected = want.Mean();
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-5) << i;
    for (int i = 0; i < channels; ++i) {
      ASSERT_NEAR(moments.FirstMoment(1)[i], want.FirstMoment()[i], 1e-5);
      ASSERT_NEAR(moments.Energy(1)[i], want.Energy()[i], 1e-5);
      ASSERT_EQ(moments.Product(1, i, channels - 1), moments.Product(1, channels - 1, i));
    }
    for (const float value : moments.Mean(0)) ASSERT_EQ(value, 0);
    for (const float value : moments.FirstMoment(0)) ASSERT_EQ(value, 0);
  }
}

// Row 0 is told to be one, row 2 holds as much as one: of tokens that repeat the first.
TEST(ChannelMoments, TellSinksFromOtherRows) {
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  constexpr int kChannels = 70, kRows = 20;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> hidden(kRows * kChannels);
  for (float& value : hidden) value = normal(random);
  for (const int row : {0, 2}) {
    for (int c = 0; c < kChannels; ++c) hidden[row * kChannels + c] *= 20;
  }
  std::vector<int> rows;
  for (int r = 1; r < kRows; ++r) rows.push_back(r);
  ChannelMoments moments(1, kChannels);
  const std::vector<int> first = {0};
  moments.Add(0, ConstMatrix(hidden.data(), kRows, kChannels), rows, first, backend.get());
  EXPECT_EQ(moments.tokens(), kRows - 2);
  EXPECT_EQ(moments.layer(0).sinks.rows, 2);
  SecondMoments want(kChannels, 0, backend.get());
  for (int r = 0; r < kRows; ++r) {
    const std::span row(hidden.data() + r * kChannels, kChannels);
    if (r == 0 || r == 2) {
      want.AddSink(row, {});
    } else {
      ASSERT_TRUE(want.Add(ConstMatrix(row.data(), 1, kChannels), {}).ok());
    }
  }
  const std::vector<float> got = moments.Mean(0), expected = want.Mean();
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-4) << i;
}

TEST(ChannelMoments, TakeAsManyRowsAsTheySay) {
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  ChannelMoments moments(1, 2);
  std::vector<float> hidden;
  std::vector<int> rows;
  for (int r = 0; r < ChannelMoments::kMostRows; ++r) {
    hidden.insert(hidden.end(), {1, 2});
    rows.push_back(r);
  }
  moments.Add(0, ConstMatrix(hidden.data(), ChannelMoments::kMostRows, 2), rows, {}, backend.get());
  EXPECT_EQ(moments.Mean(0), (std::vector<float>{1, 2, 2, 4}));
}

}  // namespace
}  // namespace espalier
