// Sums over what a model's matrices meet: gathered of rows of rung 0 alone, kept over a restart,
// and of this model or refused by what differs.
#include "engine/model/moments_file.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "engine/model/model_executor.h"
#include "engine/model/own_file.h"
#include "engine/model/pruning_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

constexpr MatrixInput kAllInputs[] = {MatrixInput::kQkv, MatrixInput::kO, MatrixInput::kGateUp,
                                      MatrixInput::kDown};

class MomentsFileTest : public ::testing::Test {
 protected:
  MomentsFileTest()
      : model_(ModelFile::Open(folder_.Write("model.gguf", TinyGguf().Bytes())).value()),
        executor_(ModelExecutor::Load(*model_, backend_.get(), {.kv_bytes = 1 << 20}).value()),
        path_(folder_.path() + "/moments.gguf") {}

  struct Prompt {
    int first_token = 0;
    int rung = 0;
  };

  // A step of prompts of kRows rows each.
  static constexpr int kRows = ModelExecutor::kGatheredRows;
  void Step(const std::vector<Prompt>& prompts) {
    const int layers = model_->config().layers;
    Batch batch;
    std::vector<std::vector<std::vector<int32_t>>> tables(prompts.size());
    int32_t page = 0;
    for (size_t i = 0; i < prompts.size(); ++i) {
      for (int layer = 0; layer < layers; ++layer) tables[i].push_back({page++});
      for (int row = 0; row < kRows; ++row) batch.tokens.push_back(prompts[i].first_token + row);
    }
    for (size_t i = 0; i < prompts.size(); ++i) {
      batch.spans.push_back({.id = static_cast<RequestId>(i + 1),
                             .first_row = static_cast<int>(i) * kRows,
                             .rows = kRows,
                             .rung = prompts[i].rung,
                             .page_tables = tables[i]});
    }
    batch.prefill_rows = batch.rows();
    StepResult result;
    ASSERT_TRUE(executor_->Execute(batch, &result).ok());
  }

  InputMoments Gathered() {
    InputMoments moments(model_->config());
    executor_->set_input_moments(&moments, 1);
    Step({{.first_token = 3}});
    Step({{.first_token = 40}});
    executor_->set_input_moments(nullptr, 1);
    return moments;
  }

  void ExpectEqual(const InputMoments& a, const InputMoments& b) {
    for (int layer = 0; layer < model_->config().layers; ++layer) {
      for (const MatrixInput input : kAllInputs) {
        const ColumnMoments &x = a.of(layer, input), &y = b.of(layer, input);
        EXPECT_EQ(x.tokens(), y.tokens());
        EXPECT_EQ(x.Squares(), y.Squares());
        EXPECT_EQ(x.Mean(), y.Mean());
      }
    }
  }

  absl::Status Write(const InputMoments& moments) {
    return WriteMoments(path_, LineageOf(*model_), model_->config(), moments);
  }

  TemporaryFolder folder_;
  std::unique_ptr<ModelFile> model_;
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::unique_ptr<ModelExecutor> executor_;
  std::string path_;
};

TEST_F(MomentsFileTest, ReadsWhatItWrote) {
  const InputMoments moments = Gathered();
  EXPECT_EQ(moments.tokens(), 2 * kRows);
  for (const MatrixInput input : kAllInputs) {
    EXPECT_GT(std::ranges::max(moments.of(1, input).Squares()), 0);
  }
  ASSERT_TRUE(Write(moments).ok());
  const absl::StatusOr<InputMoments> read = ReadMoments(path_, *model_);
  ASSERT_TRUE(read.ok()) << read.status();
  ExpectEqual(*read, moments);
}

TEST_F(MomentsFileTest, RowsOfHarderRungsAreLeftOut) {
  const InputMoments alone = Gathered();
  const SiteWidths sites = model_->config().sites();
  Ladder ladder = Ladder::DenseOnly(sites);
  KeepProfile keep = KeepProfile::Dense(sites);
  keep.Keep(1, SiteKind::kHeads, 0);  // the MLPs of this rung keep all channels
  ASSERT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  keep.Keep(0, SiteKind::kChannels, 0);
  ASSERT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  ASSERT_TRUE(executor_->SetLadder(ladder, StaticSelector(sites)).ok());
  InputMoments moments(model_->config());
  executor_->set_input_moments(&moments, 1);
  Step({{.first_token = 7, .rung = 2}, {.first_token = 3}, {.first_token = 90, .rung = 1}});
  Step({{.first_token = 7, .rung = 1}});
  Step({{.first_token = 9, .rung = 1}, {.first_token = 40}});
  ExpectEqual(moments, alone);
}

TEST_F(MomentsFileTest, OneStepOfSoManyIsGathered) {
  InputMoments moments(model_->config());
  executor_->set_input_moments(&moments, 4);
  for (int step = 0; step < 9; ++step) Step({{.first_token = step}});
  EXPECT_EQ(moments.tokens(), 3 * kRows);
}

TEST_F(MomentsFileTest, IsNotThereBeforeItIsWritten) {
  EXPECT_EQ(ReadMoments(path_, *model_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(MomentsFileTest, RefusesByTheFirstThingThatDiffers) {
  const auto refusal = [&] {
    const absl::Status status = ReadMoments(path_, *model_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const InputMoments moments = Gathered();
  ASSERT_TRUE(WriteMoments(path_, "another", model_->config(), moments).ok());
  EXPECT_THAT(refusal(), HasSubstr("made for another model"));

  ModelConfig wider = model_->config();
  wider.channels = 40;
  ASSERT_TRUE(WriteMoments(path_, "another", wider, InputMoments(wider)).ok());
  EXPECT_THAT(refusal(), HasSubstr("espalier.channels\": expected 24, got 40"));
  wider.layers = 3;
  ASSERT_TRUE(WriteMoments(path_, "another", wider, InputMoments(wider)).ok());
  EXPECT_THAT(refusal(), HasSubstr("espalier.layers\": expected 2, got 3"));

  ASSERT_TRUE(WritePruningFile(path_, *model_, {}).ok());
  EXPECT_THAT(refusal(), HasSubstr("espalier-moments"));

  for (const double fault : {-1.0, std::numeric_limits<double>::infinity()}) {
    InputMoments broken = moments;
    ColumnMoments& of = broken.of(1, MatrixInput::kO);
    std::vector<double> squares(of.squares().begin(), of.squares().end());
    squares[5] = fault;
    const std::vector<double> sums(of.sums().begin(), of.sums().end());
    of.Restore(of.tokens(), sums, squares);
    ASSERT_TRUE(Write(broken).ok());
    EXPECT_THAT(refusal(), HasSubstr("tensor blk.1.attn_output.moments: expected"));
  }

  ASSERT_TRUE(Write(moments).ok());
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 40);
  EXPECT_THAT(refusal(), HasSubstr("moments.gguf"));
}

TEST_F(MomentsFileTest, NamesThePathThatCannotBeWritten) {
  const absl::Status status =
      WriteMoments("/nowhere/moments.gguf", "x", model_->config(), Gathered());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/moments.gguf"));
}

}  // namespace
}  // namespace espalier
