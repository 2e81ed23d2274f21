// Calibration's sweep: layers run one by one are the model, and what is fitted to the residual
// stream brings it nearer to the dense one.
#include "tools/layer_fit.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "engine/model/decoder.h"
#include "engine/model/down_norms.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"
#include "tools/forced_run.h"

namespace espalier {
namespace {

constexpr int kStepRows = 16, kLength = 40;

class LayerFitTest : public ::testing::Test {
 protected:
  LayerFitTest()
      : file_(ModelFile::Open(ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama.gguf").value()),
        executor_(
            ModelExecutor::Load(*file_, backend_.get(), {.max_batch_tokens = kStepRows}).value()),
        widths_(file_->config().sites()) {
    std::mt19937 random(3);
    std::uniform_int_distribution<int32_t> token(0, file_->config().vocabulary - 1);
    windows_.assign(24, std::vector<int32_t>(kLength));
    for (std::vector<int32_t>& window : windows_) {
      for (int32_t& id : window) id = token(random);
    }
    // All but the last layer, which is looked at.
    for (const int kept : {64, 32, 0}) {
      KeepProfile keep = KeepProfile::Dense(widths_);
      for (int layer = 0; layer + 1 < widths_.layers; ++layer) {
        keep.Keep(layer, SiteKind::kChannels, kept);
      }
      EXPECT_TRUE(ladder_.Append({.prefill = keep, .decode = keep}));
    }
  }

  absl::StatusOr<PruningData> Fit(LayerFitOptions options) {
    options.step_rows = kStepRows;
    return FitLayers(options, ladder_, *file_, windows_, executor_.get(), backend_.get(),
                     [&](int64_t done, int64_t total) {
                       done_ = done;
                       total_ = total;
                       return done < stop_at_;
                     });
  }

  // What meets `down` in the last layer.
  std::vector<float> LastHidden(int rung) {
    std::vector<float> all;
    executor_->set_channel_observer([&](int layer, ConstMatrix hidden) {
      if (layer + 1 < widths_.layers) return;
      for (int r = 0; r < hidden.rows; ++r) {
        all.insert(all.end(), hidden.row(r), hidden.row(r) + hidden.cols);
      }
    });
    for (const std::vector<int32_t>& window : windows_) {
      const ForcedText text{.tokens = window, .prompt = kLength, .rung = rung, .scored = false};
      EXPECT_TRUE(RunForced(executor_.get(), kStepRows, {&text, 1}).ok());
    }
    executor_->set_channel_observer({});
    return all;
  }

  std::string Written(const PruningData& data) {
    const TemporaryFolder folder;
    const std::string path = folder.Path("data");
    EXPECT_TRUE(WritePruningFile(path, *file_, data).ok());
    const MappedFile file = MappedFile::Open(path).value();
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
  }

  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::unique_ptr<ModelFile> file_;
  std::unique_ptr<ModelExecutor> executor_;
  SiteWidths widths_;
  Ladder ladder_ = Ladder::DenseOnly(widths_);
  std::vector<std::vector<int32_t>> windows_;
  int64_t done_ = 0, total_ = 0, stop_at_ = INT64_MAX;
};

double Off(const std::vector<float>& a, const std::vector<float>& b) {
  double off = 0;
  for (size_t i = 0; i < a.size(); ++i) off += double{a[i] - b[i]} * (a[i] - b[i]);
  return off;
}

TEST_F(LayerFitTest, LayersOneByOneAreTheModel) {
  ASSERT_TRUE(executor_->SetLadder(ladder_, StaticSelector(widths_)).ok());
  Batch batch;
  batch.tokens.assign(windows_[0].begin(), windows_[0].begin() + kStepRows);
  const std::vector<std::vector<int32_t>> tables(widths_.layers, {0}), other(widths_.layers, {1});
  // Rungs out of order: the executor sorts rows, and gives them back unsorted.
  batch.spans = {{.id = 1, .first_row = 0, .rows = 7, .rung = 1, .page_tables = tables},
                 {.id = 2, .first_row = 7, .rows = 9, .rung = 0, .page_tables = other}};
  batch.prefill_rows = kStepRows;
  using Rows = std::vector<float>;
  std::vector<Rows> want, got;
  const auto observe = [&](std::vector<Rows>* seen) {
    executor_->set_channel_observer([seen](int, ConstMatrix hidden) {
      Rows& rows = seen->emplace_back();
      for (int r = 0; r < hidden.rows; ++r) {
        rows.insert(rows.end(), hidden.row(r), hidden.row(r) + hidden.cols);
      }
    });
  };
  observe(&want);
  StepResult result;
  ASSERT_TRUE(executor_->Execute(batch, &result).ok());
  observe(&got);
  std::vector<float> residual(kStepRows * file_->config().hidden);
  for (int layer = 0; layer < widths_.layers; ++layer) {
    ASSERT_TRUE(
        executor_
            ->ExecuteLayer(batch, layer, Matrix(residual.data(), kStepRows, file_->config().hidden))
            .ok());
  }
  EXPECT_EQ(want, got);
  EXPECT_EQ(want.size(), 2 * widths_.layers - 1) << "the last is whole for all";
}

TEST_F(LayerFitTest, BringsTheStreamNearerToTheDenseOne) {
  const absl::StatusOr<PruningData> ranked =
      Fit({.rank = "elimination", .compensation = Compensation::kNone});
  ASSERT_TRUE(ranked.ok()) << ranked.status();
  EXPECT_EQ(done_, total_);
  const absl::StatusOr<PruningData> biased =
      Fit({.rank = "elimination", .compensation = Compensation::kMean});
  ASSERT_TRUE(biased.ok()) << biased.status();
  EXPECT_EQ(done_, total_);
  const absl::StatusOr<PruningData> fitted = Fit({.rank = "elimination"});
  ASSERT_TRUE(fitted.ok()) << fitted.status();
  EXPECT_EQ(done_, total_);
  for (int layer = 0; layer < widths_.layers; ++layer) {
    const bool last = layer + 1 == widths_.layers;
    EXPECT_EQ(fitted->layers[layer].ranking, ranked->layers[layer].ranking);
    EXPECT_EQ(fitted->layers[layer].ranking.empty(), last);
    EXPECT_EQ(fitted->layers[layer].refits.size(), last ? 0 : 2) << "none of nothing";
    EXPECT_TRUE(ranked->layers[layer].refits.empty());
    EXPECT_EQ(biased->layers[layer].ranking, ranked->layers[layer].ranking);
    for (const auto& [kept, refit] : biased->layers[layer].refits) {
      EXPECT_TRUE(refit.down.empty());
      EXPECT_EQ(refit.bias.size(), file_->config().hidden);
    }
  }
  const std::vector<float> dense = LastHidden(0);
  ASSERT_TRUE(executor_->SetLadder(ladder_, PruningDataSelector(widths_, &*ranked)).ok());
  const double plain[] = {Off(LastHidden(1), dense), Off(LastHidden(2), dense)};
  ASSERT_TRUE(executor_->SetLadder(ladder_, PruningDataSelector(widths_, &*biased)).ok());
  EXPECT_LT(Off(LastHidden(1), dense), plain[0]);
  EXPECT_LT(Off(LastHidden(2), dense), plain[1]);
  ASSERT_TRUE(executor_->SetLadder(ladder_, PruningDataSelector(widths_, &*fitted)).ok());
  EXPECT_LT(Off(LastHidden(1), dense), 0.9 * plain[0]);
  EXPECT_LT(Off(LastHidden(2), dense), 0.9 * plain[1]);
}

TEST_F(LayerFitTest, FitsNothingThatAProbeChooses) {
  const absl::StatusOr<PruningData> fitted = Fit({.rank = "elimination"});
  ASSERT_TRUE(fitted.ok()) << fitted.status();
  PruningData ranked = *fitted;
  for (PruningData::Layer& layer : ranked.layers) layer.refits.clear();
  const auto probed = [&](const PruningData& data) {
    EXPECT_TRUE(executor_->SetLadder(ladder_, PruningDataSelector(widths_, &data)).ok());
    Probe probe({.rows = ProbeOptions::Rows::kAll, .fuse = false, .keep = 1},
                {History(widths_.layers, widths_.channels),
                 std::vector(widths_.layers, std::vector<float>(widths_.channels, 1))});
    executor_->set_probe(&probe);
    std::vector<float> hidden = LastHidden(1);
    executor_->set_probe(nullptr);
    return hidden;
  };
  EXPECT_EQ(probed(*fitted), probed(ranked));
}

TEST_F(LayerFitTest, SeesBlocksThatAreDropped) {
  // The first layer's attention leaves, and the second's channels have to make up for it.
  Ladder dropped = Ladder::DenseOnly(widths_);
  KeepProfile keep = dropped.rung(0).prefill;
  keep.Keep(0, SiteKind::kHeads, 0);
  keep.Keep(1, SiteKind::kChannels, 64);
  ASSERT_TRUE(dropped.Append({.prefill = keep, .decode = keep}));
  ladder_ = dropped;
  const absl::StatusOr<PruningData> with = Fit({.rank = "ppsp"});
  ASSERT_TRUE(with.ok()) << with.status();
  EXPECT_EQ(done_, total_);
  EXPECT_TRUE(with->layers[0].ranking.empty());
  ladder_ = Ladder::DenseOnly(widths_);
  KeepProfile whole = ladder_.rung(0).prefill;
  whole.Keep(1, SiteKind::kChannels, 64);
  ASSERT_TRUE(ladder_.Append({.prefill = whole, .decode = whole}));
  const absl::StatusOr<PruningData> without = Fit({.rank = "ppsp"});
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_EQ(with->layers[1].ranking, without->layers[1].ranking);
  const auto bytes = [](const PruningData& data) {
    const std::vector<FourBitGroup>& down = data.layers[1].refits.at(64).down;
    return std::string(reinterpret_cast<const char*>(down.data()),
                       down.size() * sizeof(FourBitGroup));
  };
  EXPECT_NE(bytes(*with), bytes(*without));
}

TEST_F(LayerFitTest, RanksHeadsByWhatMeetsO) {
  const ModelConfig& config = file_->config();
  ladder_ = Ladder::DenseOnly(widths_);
  KeepProfile keep = ladder_.rung(0).prefill;
  for (int layer = 0; layer + 1 < widths_.layers; ++layer) {
    keep.Keep(layer, SiteKind::kHeads, widths_.heads / 2);
    keep.Keep(layer, SiteKind::kChannels, 64);
  }
  ASSERT_TRUE(ladder_.Append({.prefill = keep, .decode = keep}));
  const LayerFitOptions options = {.rank = "elimination"};
  const absl::StatusOr<PruningData> fitted = Fit(options);
  ASSERT_TRUE(fitted.ok()) << fitted.status();
  EXPECT_EQ(done_, total_);
  const int64_t sweeps = done_;
  EXPECT_TRUE(fitted->layers.back().heads.empty());

  // By the definition: E[x^2] times the root of the sum of w^4, summed over a head's columns.
  const int columns = config.heads * config.head_dim;
  std::vector<std::vector<double>> energy(widths_.layers, std::vector<double>(columns));
  executor_->set_input_observer([&](int layer, MatrixInput input, ConstMatrix rows) {
    if (input != MatrixInput::kO) return;
    for (int r = 0; r < rows.rows; ++r) {
      for (int j = 0; j < columns; ++j) energy[layer][j] += double{rows.row(r)[j]} * rows.row(r)[j];
    }
  });
  ASSERT_TRUE(executor_->SetLadder(Ladder::DenseOnly(widths_), StaticSelector(widths_)).ok());
  for (const std::vector<int32_t>& window : windows_) {
    const ForcedText text{.tokens = window, .prompt = kLength, .rung = 0, .scored = false};
    ASSERT_TRUE(RunForced(executor_.get(), kStepRows, {&text, 1}).ok());
  }
  executor_->set_input_observer({});
  for (int layer = 0; layer + 1 < widths_.layers; ++layer) {
    const std::vector<float> o = ReadO(*file_, layer).value();
    std::vector<std::pair<double, int>> scores;
    for (int head = 0; head < config.heads; ++head) {
      double score = 0;
      for (int j = head * config.head_dim; j < (head + 1) * config.head_dim; ++j) {
        double fourth = 0;
        for (int n = 0; n < config.hidden; ++n) fourth += std::pow(o[n * columns + j], 4);
        score += energy[layer][j] * std::sqrt(fourth);
      }
      scores.emplace_back(-score, head);
    }
    std::ranges::sort(scores);
    std::vector<int32_t> want;
    for (const auto& [score, head] : scores) want.push_back(head);
    // Position 0 is in `energy`, and not in what ranks: heads are far enough apart.
    EXPECT_EQ(fitted->layers[layer].heads, want) << layer;
  }

  PruningData plain = *fitted;
  for (PruningData::Layer& layer : plain.layers) layer.refits.clear();
  const std::vector<float> dense = LastHidden(0);
  ASSERT_TRUE(executor_->SetLadder(ladder_, PruningDataSelector(widths_, &plain)).ok());
  const double off = Off(LastHidden(1), dense);
  ASSERT_TRUE(executor_->SetLadder(ladder_, PruningDataSelector(widths_, &*fitted)).ok());
  EXPECT_LT(Off(LastHidden(1), dense), 0.95 * off) << "down makes up for heads, too";

  const TemporaryFolder folder;
  LayerFitOptions kept = options;
  kept.checkpoint = folder.Path("part");
  stop_at_ = sweeps;
  EXPECT_EQ(Fit(kept).status().code(), absl::StatusCode::kCancelled);
  stop_at_ = INT64_MAX;
  const absl::StatusOr<PruningData> resumed = Fit(kept);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_LT(done_, sweeps);
  EXPECT_EQ(Written(*resumed), Written(*fitted));
}

TEST_F(LayerFitTest, RungsThatMixCountsShareWhatOthersAreFittedFor) {
  const auto fit = [&](const std::vector<std::pair<int, int>>& kept) {  // of the first two layers
    ladder_ = Ladder::DenseOnly(widths_);
    for (const auto& [first, second] : kept) {
      KeepProfile keep = KeepProfile::Dense(widths_);
      keep.Keep(0, SiteKind::kChannels, first);
      keep.Keep(1, SiteKind::kChannels, second);
      EXPECT_TRUE(ladder_.Append({.prefill = keep, .decode = keep}));
    }
    const absl::StatusOr<PruningData> data = Fit({.rank = "ppsp"});
    EXPECT_TRUE(data.ok()) << data.status();
    EXPECT_EQ(done_, total_);
    return Written(*data);
  };
  const std::string uniform = fit({{64, 64}, {32, 32}});
  const int64_t sweeps = done_;
  EXPECT_EQ(fit({{64, 128}, {64, 64}, {32, 64}, {32, 32}}), uniform);
  EXPECT_EQ(done_, sweeps) << "no way through the model for a rung that nothing is fitted to";
}

TEST_F(LayerFitTest, GoesOnWhereItWasStopped) {
  const TemporaryFolder folder;
  for (const Compensation compensation :
       {Compensation::kNone, Compensation::kMean, Compensation::kRefit}) {
    const LayerFitOptions options = {.rank = "elimination", .compensation = compensation};
    const absl::StatusOr<PruningData> want = Fit(options);
    ASSERT_TRUE(want.ok()) << want.status();
    const int64_t sweeps = done_;
    int resumed = 0;
    LayerFitOptions kept = options;
    kept.checkpoint = folder.Path("part");
    kept.resumed = [&](int layers) { resumed = layers; };
    stop_at_ = sweeps;  // in the last layer
    EXPECT_EQ(Fit(kept).status().code(), absl::StatusCode::kCancelled);
    EXPECT_EQ(resumed, 0);
    stop_at_ = INT64_MAX;
    const absl::StatusOr<PruningData> got = Fit(kept);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_GT(resumed, 0);
    EXPECT_EQ(done_, total_);
    if (compensation != Compensation::kNone) {
      EXPECT_LT(done_, sweeps);
    }
    EXPECT_EQ(Written(*want), Written(*got));

    resumed = 0;
    std::swap(windows_[0], windows_[1]);
    EXPECT_TRUE(Fit(kept).ok());
    EXPECT_EQ(resumed, 0) << "of other windows";
    std::swap(windows_[0], windows_[1]);
  }
}

TEST_F(LayerFitTest, StopsWhenTold) {
  stop_at_ = 3;
  EXPECT_EQ(Fit({.rank = "ppsp"}).status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(done_, 3);
}

}  // namespace
}  // namespace espalier
