// A set of blocks costs the same however the table came to it, and what the model without them
// loses when a server's step runs it.
#include "tools/block_loss.h"

#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"
#include "tools/forced_run.h"

namespace espalier {
namespace {

constexpr int kStepRows = 64, kLength = 32;

class BlockLossTest : public ::testing::Test {
 protected:
  BlockLossTest()
      : file_(ModelFile::Open(ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama.gguf").value()),
        executor_(
            ModelExecutor::Load(*file_, backend_.get(), {.max_batch_tokens = kStepRows}).value()) {
    std::mt19937 random(3);
    std::uniform_int_distribution<int32_t> token(0, file_->config().vocabulary - 1);
    windows_.assign(5, std::vector<int32_t>(kLength));
    for (std::vector<int32_t>& window : windows_) {
      for (int32_t& id : window) id = token(random);
    }
  }

  BlockLossTable Table(const std::string& path = "") {
    BlockLossTable table(executor_.get(), windows_, kStepRows, path);
    EXPECT_TRUE(table.Open().ok());
    return table;
  }

  // By whole steps, a window each.
  double ByExecute(const BlockSet& removed) {
    const SiteWidths widths = file_->config().sites();
    KeepProfile keep = KeepProfile::Dense(widths);
    for (int layer = 0; layer < widths.layers; ++layer) {
      if (removed[AttentionBlock(layer)]) keep.Keep(layer, SiteKind::kHeads, 0);
      if (removed[MlpBlock(layer)]) keep.Keep(layer, SiteKind::kChannels, 0);
    }
    Ladder ladder = Ladder::DenseOnly(widths);
    EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
    EXPECT_TRUE(executor_->SetLadder(ladder, StaticSelector(widths)).ok());
    double sum = 0;
    int terms = 0;
    for (const std::vector<int32_t>& window : windows_) {
      std::vector<std::vector<int32_t>> tables;
      for (int layer = 0, page = 0; layer < widths.layers; ++layer, page += kLength / kPageTokens) {
        tables.push_back({page, page + 1});
      }
      static_assert(kLength == 2 * kPageTokens);
      Batch batch;
      AddForcedRows({.tokens = window, .rung = 1}, 0, 0, kLength, false, true, tables, &batch);
      StepResult result;
      EXPECT_TRUE(executor_->Execute(batch, &result).ok());
      for (size_t i = 0; i < batch.logits.size(); ++i) {
        if (batch.logits[i].row % 2 == 0) continue;
        sum -= result.tokens[i].logprob;
        ++terms;
      }
    }
    return sum / terms;
  }

  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::unique_ptr<ModelFile> file_;
  std::unique_ptr<ModelExecutor> executor_;
  std::vector<std::vector<int32_t>> windows_;
};

TEST_F(BlockLossTest, IsThatOfWholeSteps) {
  const int last = file_->config().layers - 1;
  for (const BlockSet& removed :
       {BlockSet(), BlockSet().set(AttentionBlock(0)), BlockSet().set(MlpBlock(last)),
        BlockSet().set(AttentionBlock(0)).set(MlpBlock(0)),
        BlockSet().set(AttentionBlock(last)).set(MlpBlock(last)).set(MlpBlock(0))}) {
    BlockLossTable table = Table();
    EXPECT_NEAR(table.Loss(removed).value(), ByExecute(removed), 1e-6) << DescribeBlocks(removed);
  }
}

TEST_F(BlockLossTest, DoesNotDependOnWhatWasMeasuredBefore) {
  std::mt19937 random(5);
  const int blocks = 2 * file_->config().layers;
  BlockLossTable walked = Table();
  for (int i = 0; i < 20; ++i) {
    BlockSet removed;
    for (int block = 0; block < blocks; ++block) removed[block] = random() % 3 == 0;
    BlockLossTable fresh = Table();
    ASSERT_EQ(walked.Loss(removed), fresh.Loss(removed)) << DescribeBlocks(removed);
  }
}

TEST_F(BlockLossTest, MeasuresOnce) {
  BlockLossTable table = Table();
  const std::optional<double> loss = table.Loss(BlockSet().set(1));
  EXPECT_EQ(table.Loss(BlockSet().set(1)), loss);
  EXPECT_EQ(table.measured(), 1);
}

TEST_F(BlockLossTest, GoesOnFromItsFile) {
  const TemporaryFolder folder;
  const std::string path = folder.Path("losses");
  std::optional<double> whole, less;
  {
    BlockLossTable table = Table(path);
    whole = table.Loss({});
    less = table.Loss(BlockSet().set(2));
  }
  std::ofstream(path, std::ios::app) << "x.x";  // a line that was being written
  BlockLossTable again = Table(path);
  EXPECT_EQ(again.known(), 2);
  EXPECT_EQ(again.Loss({}), whole);
  EXPECT_EQ(again.Loss(BlockSet().set(2)), less);
  EXPECT_EQ(again.measured(), 0);
  // Of other text it has nothing, and starts anew.
  windows_[0][3] ^= 1;
  EXPECT_EQ(Table(path).known(), 0);
}

TEST_F(BlockLossTest, NamesAFileThatCannotBeWritten) {
  BlockLossTable table(executor_.get(), windows_, kStepRows, "/nowhere/losses");
  EXPECT_EQ(table.Open().message(), "/nowhere/losses: cannot be written");
}

TEST_F(BlockLossTest, InfluenceIsOneNumberALayer) {
  BlockLossTable table = Table();
  const std::vector<double> influence = table.LayerInfluence();
  ASSERT_EQ(influence.size(), file_->config().layers);
  for (const double value : influence) {
    EXPECT_GT(value, 0);
    EXPECT_LE(value, 2);
  }
}

}  // namespace
}  // namespace espalier
