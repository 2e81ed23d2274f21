// Rankings and refits of a server's sums: at the first layer that is narrowed, those that its text
// gives; and no ladder of sums that say too little.
#include "tools/moment_fit.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "engine/model/channel_moments_file.h"
#include "engine/model/down_norms.h"
#include "engine/model/model_executor.h"
#include "engine/model/own_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"
#include "tests/support/run_command.h"
#include "tools/forced_run.h"
#include "tools/layer_fit.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

constexpr int kStepRows = 16, kLength = 40;
constexpr int kKept = 64;

float ValueOf(uint16_t half) { return float{Eigen::numext::bit_cast<Eigen::half>(half)}; }

// The values of a refitted `down`, [hidden, kept].
std::vector<float> ValuesOf(const RefittedDown& refit) {
  std::vector<float> values;
  for (const FourBitGroup& group : refit.down) {
    for (int k = 0; k < kQuantGroup; ++k) {
      const int half = kQuantGroup / 2;
      const int step = k < half ? group.u[k] & 15 : group.u[k - half] >> 4;
      values.push_back(ValueOf(group.scale) * static_cast<float>(step) + ValueOf(group.minimum));
    }
  }
  return values;
}

// |a - b| / |b|
double Off(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double off = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    off += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    size += double{b[i]} * b[i];
  }
  return std::sqrt(off / size);
}

class MomentFitTest : public ::testing::Test {
 protected:
  MomentFitTest() : moments_(file_->config().layers, file_->config().channels) {
    std::mt19937 random(3);
    std::uniform_int_distribution<int32_t> token(0, file_->config().vocabulary - 1);
    windows_.assign(48, std::vector<int32_t>(kLength));
    for (std::vector<int32_t>& window : windows_) {
      for (int32_t& id : window) id = token(random);
    }
    KeepProfile keep = KeepProfile::Dense(widths_);
    for (int layer = 0; layer + 1 < widths_.layers; ++layer) {
      keep.Keep(layer, SiteKind::kChannels, kKept);
    }
    EXPECT_TRUE(ladder_.Append({.prefill = keep, .decode = keep}));
    Gather();
  }

  // Of every layer, all rows that calibration sees.
  void Gather() {
    std::vector<int> pieces(widths_.layers);
    executor_->set_channel_observer([&](int layer, ConstMatrix hidden) {
      constexpr int kPieces = (kLength + kStepRows - 1) / kStepRows;
      std::vector<int> rows;
      for (int r = pieces[layer]++ % kPieces == 0 ? 1 : 0; r < hidden.rows; ++r) rows.push_back(r);
      moments_.Add(layer, hidden, rows, {}, backend_.get());
    });
    for (const std::vector<int32_t>& window : windows_) {
      const ForcedText text{.tokens = window, .prompt = kLength, .scored = false};
      ASSERT_TRUE(RunForced(executor_.get(), kStepRows, {&text, 1}).ok());
    }
    executor_->set_channel_observer({});
  }

  PruningData ByText(const std::string& rank, Compensation compensation) {
    return FitLayers({.rank = rank, .compensation = compensation, .step_rows = kStepRows}, ladder_,
                     *file_, windows_, executor_.get(), backend_.get(),
                     [](int64_t, int64_t) { return true; })
        .value();
  }
  absl::StatusOr<PruningData> ByMoments(const std::string& rank, Compensation compensation) {
    return FitToMoments(
        {.rank = rank, .compensation = compensation, .channel_group = executor_->channel_group()},
        ladder_, *file_, moments_, backend_.get(), [&](int64_t done, int64_t total) {
          EXPECT_LE(done, total);
          return done < stop_at_;
        });
  }

  const std::string model_ = ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama.gguf";
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::unique_ptr<ModelFile> file_ = ModelFile::Open(model_).value();
  std::unique_ptr<ModelExecutor> executor_ =
      ModelExecutor::Load(*file_, backend_.get(),
                          {.weights = WeightPlan::kF32, .max_batch_tokens = kStepRows})
          .value();
  SiteWidths widths_ = file_->config().sites();
  Ladder ladder_ = Ladder::DenseOnly(widths_);
  std::vector<std::vector<int32_t>> windows_;
  ChannelMoments moments_;
  int64_t stop_at_ = INT64_MAX;
};

TEST_F(MomentFitTest, FitsTheFirstNarrowedLayerAsItsTextDoes) {
  for (const char* rank : {"elimination", "ppsp", "flap"}) {
    const PruningData text = ByText(rank, Compensation::kRefit);
    const absl::StatusOr<PruningData> moments = ByMoments(rank, Compensation::kRefit);
    ASSERT_TRUE(moments.ok()) << moments.status();
    ASSERT_EQ(moments->layers.size(), text.layers.size());
    for (size_t layer = 0; layer < text.layers.size(); ++layer) {
      EXPECT_EQ(moments->layers[layer].ranking, text.layers[layer].ranking) << rank << layer;
      EXPECT_EQ(moments->layers[layer].refits.size(), text.layers[layer].refits.size());
    }
    const RefittedDown& got = moments->layers[0].refits.at(kKept);
    const RefittedDown& want = text.layers[0].refits.at(kKept);
    EXPECT_LT(Off(ValuesOf(got), ValuesOf(want)), 0.01) << rank;
    EXPECT_LT(Off(got.bias, want.bias), 0.01) << rank;
    const std::vector<float> loaded = TakeColumns(ReadDown(*file_, 0).value(), widths_.channels,
                                                  std::span(text.layers[0].ranking).first(kKept));
    EXPECT_GT(Off(ValuesOf(got), loaded), 0.1) << "they are not the same by themselves";
  }
}

TEST_F(MomentFitTest, ABiasIsWhatChannelsThatLeftGaveOnTheMean) {
  const PruningData text = ByText("elimination", Compensation::kMean);
  const absl::StatusOr<PruningData> moments = ByMoments("elimination", Compensation::kMean);
  ASSERT_TRUE(moments.ok()) << moments.status();
  const RefittedDown& got = moments->layers[0].refits.at(kKept);
  EXPECT_TRUE(got.down.empty());
  EXPECT_LT(Off(got.bias, text.layers[0].refits.at(kKept).bias), 1e-3);
  const absl::StatusOr<PruningData> none = ByMoments("elimination", Compensation::kNone);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->layers[0].ranking, moments->layers[0].ranking);
  EXPECT_TRUE(none->layers[0].refits.empty());
  EXPECT_TRUE(none->layers.back().ranking.empty()) << "nothing leaves it";
}

TEST_F(MomentFitTest, RefusesSumsThatSayTooLittle) {
  moments_.layer(1).tokens = 383;
  const absl::Status status = ByMoments("elimination", Compensation::kRefit).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("layer 1 was seen for 383 tokens, and " + std::to_string(widths_.channels) +
                        " channels take 384"));
}

TEST_F(MomentFitTest, SaysNothingOfHeads) {
  KeepProfile keep = ladder_.rung(1).prefill;
  keep.Keep(0, SiteKind::kHeads, widths_.heads / 2);
  ASSERT_TRUE(ladder_.Append({.prefill = keep, .decode = keep}));
  const absl::Status status = ByMoments("ppsp", Compensation::kNone).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("2 of 4 heads: sums of channels say nothing"));
}

TEST_F(MomentFitTest, StopsWhenTold) {
  stop_at_ = 1;
  EXPECT_EQ(ByMoments("ppsp", Compensation::kNone).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(MomentFitTest, CommandTellsWhatTheLadderIsOf) {
  const TemporaryFolder folder;
  const std::string path = folder.Path("served.moments"), ladder = folder.Path("m.ladder");
  ASSERT_TRUE(WriteChannelMoments(path, FingerprintOf(*file_), moments_).ok());
  std::vector<std::string> command = {
      "calibrate", "--model",  model_, "--moments",      path, "--tokens", "1000", "--rungs",
      "0.5",       "--widths", "0.5",  "--dense-layers", "0",  "--out",    ladder};
  unsetenv("ESPALIER_TEXT");  // options may be given so, and the tests' runner gives it
  Outcome outcome = RunWith(command);
  EXPECT_NE(outcome.code, 0);
  EXPECT_THAT(outcome.err, HasSubstr("--text"));
  command.insert(command.end(), {"--text", ESPALIER_SOURCE_DIR "/README.md"});
  outcome = RunWith(command);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::ifstream file(ladder);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_THAT(text, HasSubstr("--compensate refit --moments served.moments\n"));
  EXPECT_THAT(text, HasSubstr(std::to_string(moments_.tokens()) + " tokens, measured on"));
  // So small a model may be timed no faster pruned, and the ladder then has no rung of it.
  const std::unique_ptr<PruningFile> made =
      PruningFile::Open(ChannelsPathOf(ladder), *file_).value();
  EXPECT_TRUE(made->has_refits());

  std::vector<std::string> over = command;
  over[std::ranges::find(over, "--out") - over.begin() + 1] = path;
  outcome = RunWith(over);
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("--out: " + path + " is the --moments"));

  std::vector<std::string> heads = command;
  *(std::ranges::find(heads, "--rungs") + 1) = "0.5h0.5";
  outcome = RunWith(heads);
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("--moments: " + path + ": a rung keeps 2 of 4 heads"));

  moments_.layer(0).tokens = 7;
  for (double& sum : moments_.layer(0).sums) sum = 0;
  ASSERT_TRUE(WriteChannelMoments(path, FingerprintOf(*file_), moments_).ok());
  outcome = RunWith(command);
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("--moments: " + path + ": layer 0 was seen for 7 tokens"));
}

}  // namespace
}  // namespace espalier
