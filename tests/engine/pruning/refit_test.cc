#include "engine/pruning/refit.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include <Eigen/Core>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// Channels that are mixtures of fewer sources, as activations are.
struct Layer {
  Layer(int hidden, int channels, int sources, int seed)
      : down(hidden * channels), moments(channels * channels) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (float& value : down) value = static_cast<float>(normal(random));
    std::vector<double> mix(channels * sources);
    for (double& value : mix) value = normal(random);
    for (int i = 0; i < channels; ++i) {
      for (int j = 0; j < channels; ++j) {
        double sum = i == j ? 0.05 : 0;
        for (int s = 0; s < sources; ++s) sum += mix[i * sources + s] * mix[j * sources + s];
        moments[i * channels + j] = static_cast<float>(sum);
      }
    }
    site = {hidden, channels, down, moments};
  }

  std::vector<float> down, moments;
  DownSite site;
};

std::vector<int32_t> Natural(int channels) {
  std::vector<int32_t> ranking(channels);
  std::iota(ranking.begin(), ranking.end(), 0);
  return ranking;
}

float FromHalf(uint16_t bits) {
  return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(bits));
}

double ValueOf(const FourBitGroup& group, size_t k) {
  constexpr size_t kHalf = kQuantGroup / 2;
  const int step = k < kHalf ? group.u[k] & 15 : group.u[k - kHalf] >> 4;
  return FromHalf(group.scale) * step + FromHalf(group.minimum);
}

// What a `down` for the kept channels misses: E|W h - W' h_S|^2 / E|W h|^2. Empty groups: W' = W_S.
double MissedShare(const DownSite& site, std::span<const int32_t> kept,
                   std::span<const FourBitGroup> groups) {
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::MatrixXd moments =
      Eigen::Map<const Rows>(site.moments.data(), site.channels, site.channels).cast<double>();
  const Eigen::MatrixXd whole =
      Eigen::Map<const Rows>(site.down.data(), site.hidden, site.channels).cast<double>();
  Eigen::MatrixXd missed = whole;
  const size_t per_output = kept.size() / kQuantGroup;
  for (size_t i = 0; i < kept.size(); ++i) {
    for (int n = 0; n < site.hidden; ++n) {
      if (groups.empty()) {
        missed(n, kept[i]) = 0;
        continue;
      }
      missed(n, kept[i]) -= ValueOf(groups[n * per_output + i / kQuantGroup], i % kQuantGroup);
    }
  }
  const auto energy = [&](const Eigen::MatrixXd& of) {
    return (of * moments).cwiseProduct(of).sum();
  };
  const double all = energy(whole);
  return all > 0 ? energy(missed) / all : 0;
}

// For rows of which what the other channels would have added is missing. `mean` [channels] is added
// to what channels hold, whose moments are otherwise about zero. `ordinary`: moments without sinks.
RefittedDown RefitTo(const DownSite& site, std::span<const int32_t> kept,
                     std::vector<double> mean = {}, std::span<const float> ordinary = {}) {
  mean.resize(site.channels);
  std::vector<float> down, moments, missed, energy, kept_mean, missed_mean(site.hidden);
  const std::set<int32_t> stay(kept.begin(), kept.end());
  const auto moment = [&](int i, int j) {
    return site.moments[i * site.channels + j] + mean[i] * mean[j];
  };
  if (ordinary.empty()) ordinary = site.moments;
  for (const int32_t i : kept) {
    kept_mean.push_back(static_cast<float>(mean[i]));
    energy.push_back(static_cast<float>(ordinary[i * (site.channels + 1)] + mean[i] * mean[i]));
  }
  for (const int32_t i : kept) {
    for (const int32_t j : kept) moments.push_back(static_cast<float>(moment(i, j)));
  }
  for (int n = 0; n < site.hidden; ++n) {
    for (const int32_t j : kept) {
      down.push_back(site.down[n * site.channels + j]);
      double sum = 0;
      for (int i = 0; i < site.channels; ++i) {
        if (stay.contains(i)) continue;
        sum += double{site.down[n * site.channels + i]} * moment(i, j);
      }
      missed.push_back(static_cast<float>(sum));
    }
    for (int i = 0; i < site.channels; ++i) {
      if (stay.contains(i)) continue;
      missed_mean[n] += static_cast<float>(site.down[n * site.channels + i] * mean[i]);
    }
  }
  return RefitDown({.hidden = site.hidden,
                    .kept = static_cast<int>(kept.size()),
                    .down = down,
                    .moments = moments,
                    .missed = missed,
                    .energy = energy,
                    .mean = kept_mean,
                    .missed_mean = missed_mean});
}

TEST(Refit, MakesUpForWhatLeft) {
  const Layer layer(24, 160, 40, 1);
  const std::vector<int32_t> kept = Natural(96);
  const double before = MissedShare(layer.site, kept, {});
  const double after = MissedShare(layer.site, kept, RefitTo(layer.site, kept).down);
  EXPECT_GT(before, 0.1);
  // 96 channels of 40 sources can say nearly all that 160 do.
  EXPECT_LT(after, 0.05 * before);
}

TEST(Refit, LeavesMeansToTheBias) {
  const Layer layer(24, 160, 40, 7);
  const std::vector<int32_t> kept = Natural(96);
  std::vector<double> mean(160);
  for (int i = 0; i < 160; ++i) mean[i] = i % 7 - 2;
  const RefittedDown without = RefitTo(layer.site, kept), with = RefitTo(layer.site, kept, mean);
  for (size_t i = 0; i < without.down.size(); ++i) {
    EXPECT_NEAR(FromHalf(with.down[i].scale), FromHalf(without.down[i].scale), 1e-3) << i;
  }
  // What the channels add in the mean is what all did.
  const size_t per_output = kept.size() / kQuantGroup;
  for (int n = 0; n < 24; ++n) {
    EXPECT_EQ(without.bias[n], 0);
    double whole = 0, sum = with.bias[n];
    for (int i = 0; i < 160; ++i) whole += layer.down[n * 160 + i] * mean[i];
    for (size_t i = 0; i < kept.size(); ++i) {
      sum += ValueOf(with.down[n * per_output + i / kQuantGroup], i % kQuantGroup) * mean[i];
    }
    EXPECT_NEAR(sum, whole, 1e-3) << n;
  }
}

// A channel that ordinary rows hardly hold, and that makes what an attention sink is given: what it
// takes over of others' errors, which they do not see, the sink is given a thousand times.
TEST(Refit, LeavesSinksWhatTheyAreGivenWhereTheyCount) {
  constexpr int kChannels = 160, kSink = 70;
  Layer layer(24, kChannels, 40, 8);
  for (int i = 0; i < kChannels; ++i) {
    layer.moments[i * kChannels + kSink] *= 0.2f;
    layer.moments[kSink * kChannels + i] *= 0.2f;
  }
  std::vector<float> held(kChannels, 1), sink(layer.moments.size());
  held[kSink] = 1000;
  double trace = 0, squares = 0;
  for (int i = 0; i < kChannels; ++i) {
    trace += layer.moments[i * (kChannels + 1)];
    squares += held[i] * held[i];
    for (int j = 0; j < kChannels; ++j) sink[i * kChannels + j] = held[i] * held[j];
  }
  std::vector<float> together = layer.moments;
  for (size_t i = 0; i < sink.size(); ++i) {
    together[i] += static_cast<float>(trace / squares * sink[i]);
  }
  const std::vector<int32_t> kept = Natural(96);
  const DownSite of_sink{24, kChannels, layer.down, sink};
  const DownSite of_both{24, kChannels, layer.down, together};
  const auto without = RefitTo(layer.site, kept).down;
  const auto with = RefitTo(of_both, kept, {}, layer.moments).down;
  EXPECT_GT(MissedShare(of_sink, kept, without), 0.02);
  EXPECT_LT(MissedShare(of_sink, kept, with), 0.01);  // what rounding its column loses, 0.008
  EXPECT_LT(MissedShare(layer.site, kept, with), 2 * MissedShare(layer.site, kept, without));
}

TEST(Refit, RoundsAllChannelsBetterThanEachByItself) {
  const Layer layer(32, 128, 16, 2);
  const std::vector<int32_t> all = Natural(128);
  const double fed_back = MissedShare(layer.site, all, RefitTo(layer.site, all).down);
  // With no moments beside the diagonal nothing is fed back: each value goes to its nearest step.
  std::vector<float> diagonal(layer.moments.size());
  for (int i = 0; i < 128; ++i) diagonal[i * 129] = 1;
  const auto nearest = RefitTo({32, 128, layer.down, diagonal}, all).down;
  EXPECT_LT(fed_back, 0.5 * MissedShare(layer.site, all, nearest));
  EXPECT_EQ(MissedShare(layer.site, all, {}), 0);
}

TEST(Refit, FollowsTheOrderOfTheKept) {
  const Layer layer(8, 96, 96, 3);
  std::vector<int32_t> kept = Natural(64);
  std::ranges::reverse(kept);
  EXPECT_LT(MissedShare(layer.site, kept, RefitTo(layer.site, kept).down),
            MissedShare(layer.site, kept, {}));
}

TEST(Refit, BearsChannelsThatAreNeverUsedAndWeightsThatAreZero) {
  Layer layer(4, 64, 8, 4);
  for (int i = 0; i < 64; ++i) layer.moments[i * 64 + 5] = layer.moments[5 * 64 + i] = 0;
  std::fill_n(layer.down.begin(), 64, 0.0f);
  const std::vector<int32_t> kept = Natural(32);
  const double missed = MissedShare(layer.site, kept, RefitTo(layer.site, kept).down);
  EXPECT_TRUE(std::isfinite(missed));
  EXPECT_LT(missed, MissedShare(layer.site, kept, {}));

  const std::vector<float> nothing(64 * 64);
  const DownSite silent{4, 64, layer.down, nothing};
  EXPECT_EQ(RankByElimination(silent).size(), 64);
  EXPECT_EQ(MissedShare(silent, kept, RefitTo(silent, kept).down), 0);
}

TEST(RankByElimination, IsAPermutationThatLosesLittle) {
  const Layer layer(24, 200, 60, 5);
  const std::vector<int32_t> ranking = RankByElimination(layer.site);
  EXPECT_EQ(std::set<int32_t>(ranking.begin(), ranking.end()).size(), 200);
  const auto lost = [&](const std::vector<int32_t>& order) {
    const auto kept = std::span(order).first(96);
    return MissedShare(layer.site, kept, RefitTo(layer.site, kept).down);
  };
  EXPECT_LT(lost(ranking), lost(Natural(200)));
}

TEST(RankByElimination, LetsTwinsGoBeforeAnythingElse) {
  // Channels 64 .. 127 double 0 .. 63; 128 .. 159 are of their own.
  Layer layer(16, 160, 160, 6);
  const auto twin = [](int c) { return c >= 64 && c < 128 ? c - 64 : c; };
  std::vector<float> moments(layer.moments.size());
  for (int i = 0; i < 160; ++i) {
    for (int j = 0; j < 160; ++j) moments[i * 160 + j] = layer.moments[twin(i) * 160 + twin(j)];
  }
  const std::vector<int32_t> ranking = RankByElimination({16, 160, layer.down, moments});
  std::set<int32_t> kinds;
  for (int i = 0; i < 96; ++i) kinds.insert(twin(ranking[i]));
  EXPECT_EQ(kinds.size(), 96) << "one of each pair stays";
}

}  // namespace
}  // namespace espalier
