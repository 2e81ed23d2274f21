// Sums of what is served reach their files while the engine steps on, and go on from them.
#include "server/moments_keeper.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/model/channel_moments_file.h"
#include "engine/model/moments_file.h"
#include "engine/model/own_file.h"
#include "kernels/cpu/cpu_backend.h"
#include "policy/policy.h"
#include "server/ready_queue.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using std::chrono::minutes;
using ::testing::HasSubstr;

constexpr int kRows = 32;

class MomentsKeeperTest : public testing::Test {
 protected:
  MomentsKeeperTest() {
    options_.moments_file = folder_.Path("inputs");
    options_.channel_moments_file = folder_.Path("channels");
    engine_ = std::make_unique<Engine>(SchedulerOptions{}, executor_->kv_geometry(),
                                       executor_->ladder(), executor_.get(), &dense_);
    thread_ = std::make_unique<EngineThread>(engine_.get(), &ready_, 16, EngineHooks{});
  }

  void Open() { keeper_ = MomentsKeeper::Open(options_, *model_).value(); }

  // Steps of kRows rows, on the engine thread as all are.
  void Serve(int steps) {
    thread_->BetweenSteps([&] {
      std::vector<std::vector<int32_t>> table(model_->config().layers);
      int32_t page = 0;
      for (std::vector<int32_t>& pages : table) {
        for (int at = 0; at < kRows; at += kPageTokens) pages.push_back(page++);
      }
      for (int step = 0; step < steps; ++step) {
        Batch batch;
        for (int row = 0; row < kRows; ++row) batch.tokens.push_back(step + row);
        batch.spans.push_back({.id = 1, .rows = kRows, .page_tables = table});
        batch.prefill_rows = kRows;
        StepResult result;
        ASSERT_TRUE(executor_->Execute(batch, &result).ok());
      }
    });
  }

  // Tends, at a time, until something holds or 20 s are over.
  bool TendUntil(Instant at, const std::function<bool()>& holds) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!holds() && std::chrono::steady_clock::now() < end) {
      keeper_->Tend(at, thread_.get());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return holds();
  }

  TemporaryFolder folder_;
  ServerOptions options_;
  std::unique_ptr<ModelFile> model_ =
      ModelFile::Open(folder_.Write("model.gguf", TinyGguf().Bytes())).value();
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::unique_ptr<ModelExecutor> executor_ =
      ModelExecutor::Load(*model_, backend_.get(), {.kv_bytes = 1 << 20}).value();
  FixedPolicy dense_{0};
  std::unique_ptr<Engine> engine_;
  ReadyQueue ready_{1};
  std::unique_ptr<MomentsKeeper> keeper_;  // outlives the thread, which thaws what it has
  std::unique_ptr<EngineThread> thread_;
};

TEST_F(MomentsKeeperTest, WritesEachFileWhenItIsDueAndGathersOn) {
  Open();
  EXPECT_EQ(keeper_->input_tokens(), 0);
  EXPECT_EQ(keeper_->channel_tokens(), 0);
  keeper_->Attach(*model_, executor_.get());
  Serve(16);
  const int64_t inputs = keeper_->input_tokens().value();
  const int64_t channels = keeper_->channel_tokens().value();
  EXPECT_EQ(inputs, kRows);
  EXPECT_EQ(channels, kRows - 1);
  const Instant start = minutes(100);
  keeper_->Tend(start, thread_.get());
  keeper_->Tend(start + std::chrono::seconds(59), thread_.get());
  EXPECT_FALSE(std::filesystem::exists(options_.moments_file));
  ASSERT_TRUE(TendUntil(start + minutes(2),
                        [&] { return std::filesystem::exists(options_.moments_file); }));
  EXPECT_EQ(ReadMoments(options_.moments_file, *model_)->tokens(), inputs);
  EXPECT_FALSE(std::filesystem::exists(options_.channel_moments_file));
  ASSERT_TRUE(TendUntil(start + minutes(11),
                        [&] { return std::filesystem::exists(options_.channel_moments_file); }));
  EXPECT_EQ(ReadChannelMoments(options_.channel_moments_file, *model_)->tokens(), channels);
  // What was frozen to be written has thawed.
  EXPECT_TRUE(TendUntil(start + minutes(11), [&] {
    Serve(16);
    return keeper_->channel_tokens() > channels && keeper_->input_tokens() > inputs;
  }));
}

TEST_F(MomentsKeeperTest, GoesOnFromItsFilesAndWritesOnlyWhatIsNew) {
  Open();
  keeper_->Attach(*model_, executor_.get());
  Serve(16);
  keeper_->Close();
  EXPECT_EQ(ReadMoments(options_.moments_file, *model_)->tokens(), kRows);
  Open();
  EXPECT_EQ(keeper_->input_tokens(), kRows);
  EXPECT_EQ(keeper_->channel_tokens(), kRows - 1);
  std::filesystem::remove(options_.moments_file);
  keeper_->Close();
  EXPECT_FALSE(std::filesystem::exists(options_.moments_file));
  options_.moments_file.clear();
  Open();
  EXPECT_EQ(keeper_->input_tokens(), std::nullopt);
  // One layer is ahead of the other: a step that adds to the other alone is new, too.
  executor_->set_input_moments(nullptr, 1);  // those of before are gone
  keeper_->Attach(*model_, executor_.get());
  Serve(8);
  const int64_t before = keeper_->channel_tokens().value();
  keeper_->Close();
  EXPECT_EQ(keeper_->channel_tokens(), before);
  const ChannelMoments read = *ReadChannelMoments(options_.channel_moments_file, *model_);
  EXPECT_EQ(read.layer(0).tokens + read.layer(1).tokens, 3 * (kRows - 1));
}

TEST_F(MomentsKeeperTest, RefusesFilesOfOthersAndFoldersThatAreNotThere) {
  const ChannelMoments moments(model_->config().layers, model_->config().channels);
  ASSERT_TRUE(WriteChannelMoments(options_.channel_moments_file, LineageOf(*model_), moments).ok());
  absl::Status status = MomentsKeeper::Open(options_, *model_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("made for another model"));
  options_.channel_moments_file = folder_.path() + "/../" +
                                  std::filesystem::path(folder_.path()).filename().string() +
                                  "/moments";
  options_.moments_file = folder_.Path("moments");
  status = MomentsKeeper::Open(options_, *model_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("is the --moments-file"));
  options_.channel_moments_file = folder_.Path("nowhere/channels");
  status = MomentsKeeper::Open(options_, *model_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--channel-moments-file: "));
}

}  // namespace
}  // namespace espalier
