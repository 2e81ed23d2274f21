// A probe's history over a restart: whole and of this model, or refused by name.
#include "engine/model/history_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "engine/model/own_file.h"
#include "engine/model/pruning_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

class HistoryFileTest : public ::testing::Test {
 protected:
  HistoryFileTest()
      : model_(ModelFile::Open(folder_.Write("model.gguf", TinyGguf().Bytes())).value()),
        path_(folder_.path() + "/history.gguf") {}

  int layers() const { return model_->config().layers; }
  int channels() const { return model_->config().channels; }

  History Learned() const {
    History history(layers(), channels());
    std::vector<float> row(channels());
    for (int layer = 0; layer < layers(); ++layer) {
      for (int position = 0; position < 40; ++position) {
        for (int c = 0; c < channels(); ++c) {
          row[c] = static_cast<float>(layer + c % (position + 1));
        }
        history.Learn(layer, ConstMatrix(row.data(), 1, channels()), {&position, 1});
      }
    }
    return history;
  }

  History Heads() const { return History(layers(), model_->config().columns(SiteKind::kHeads)); }

  absl::Status Write(const History& channels, const History& heads) {
    return WriteHistory(path_, FingerprintOf(*model_), channels, heads);
  }
  absl::Status Write(const History& channels) { return Write(channels, Heads()); }

  TemporaryFolder folder_;
  std::unique_ptr<ModelFile> model_;
  std::string path_;
};

TEST_F(HistoryFileTest, ReadsWhatItWrote) {
  const History history = Learned();
  History heads = Heads();
  const std::vector<float> some(heads.Energies(1).size(), 3.5f);
  heads.Restore(1, some);
  ASSERT_TRUE(Write(history, heads).ok());
  const absl::StatusOr<SiteHistories> read = ReadHistory(path_, *model_);
  ASSERT_TRUE(read.ok()) << read.status();
  for (int layer = 0; layer < layers(); ++layer) {
    EXPECT_TRUE(std::ranges::equal(read->channels.Energies(layer), history.Energies(layer)));
    EXPECT_TRUE(std::ranges::equal(read->heads.Energies(layer), heads.Energies(layer)));
    EXPECT_GT(std::ranges::max(history.Energies(layer)), 0);
  }
}

TEST_F(HistoryFileTest, ReadsOneWithoutHeads) {
  ASSERT_TRUE(Write(Learned(), History(0, 0)).ok());
  const absl::StatusOr<SiteHistories> read = ReadHistory(path_, *model_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_GT(std::ranges::max(read->channels.Energies(1)), 0);
  EXPECT_EQ(std::ranges::max(read->heads.Energies(1)), 0);
}

TEST_F(HistoryFileTest, IsNotThereBeforeItIsWritten) {
  EXPECT_EQ(ReadHistory(path_, *model_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(HistoryFileTest, RefusesWhatIsNoHistoryOfThisModel) {
  const auto refusal = [&] {
    const absl::Status status = ReadHistory(path_, *model_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  ASSERT_TRUE(WriteHistory(path_, "another", Learned(), Heads()).ok());
  EXPECT_THAT(refusal(), HasSubstr("made for another model"));

  ASSERT_TRUE(WritePruningFile(path_, *model_, {}).ok());
  EXPECT_THAT(refusal(), HasSubstr("espalier-history"));

  ASSERT_TRUE(Write(History(layers(), channels(), 3)).ok());
  EXPECT_THAT(refusal(), HasSubstr("blk.0.energy.weight"));
  ASSERT_TRUE(Write(Learned(), Learned()).ok());
  EXPECT_THAT(refusal(), HasSubstr("blk.0.heads.weight"));

  History broken = Learned();
  std::vector<float> energies(broken.Energies(1).begin(), broken.Energies(1).end());
  for (const float fault : {-1.0f, std::numeric_limits<float>::infinity()}) {
    energies[5] = fault;
    broken.Restore(1, energies);
    ASSERT_TRUE(Write(broken).ok());
    EXPECT_THAT(refusal(), HasSubstr("blk.1.energy.weight"));
  }

  ASSERT_TRUE(Write(Learned()).ok());
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 40);
  EXPECT_THAT(refusal(), HasSubstr("history.gguf"));
}

TEST_F(HistoryFileTest, NamesThePathThatCannotBeWritten) {
  const absl::Status status = WriteHistory("/nowhere/history.gguf", "x", Learned(), Heads());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/history.gguf"));
}

}  // namespace
}  // namespace espalier
