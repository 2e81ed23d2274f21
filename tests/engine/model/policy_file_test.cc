// A learned policy's file: opened for its ladder, or refused by name; what it was trained for
// counts.
#include "engine/model/policy_file.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

constexpr int kRungs = 4;

std::string Bytes(int rungs) {
  return QNetwork({.inputs = kLevelInputs, .hidden = 8, .actions = rungs})
      .Format({.load_loss = 0.2, .ttft_target_s = 1, .tpot_target_s = 0.1, .how = "by a test"});
}

TEST(PolicyFile, OpensForItsLadder) {
  const TemporaryFolder folder;
  const std::string path = folder.Write("a.dqn", Bytes(kRungs));
  const absl::StatusOr<PolicyFile> file = OpenPolicy(path, kRungs);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->trained.load_loss, 0.2);
  const absl::Status other = OpenPolicy(path, kRungs + 1).status();
  EXPECT_EQ(other.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(other.message()), HasSubstr("4 actions"));
  EXPECT_EQ(OpenPolicy(folder.Path("none.dqn"), kRungs).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(PolicyFile, OfTheVersionBeforeIsRefusedByName) {
  const TemporaryFolder folder;
  std::string bytes = Bytes(kRungs);
  bytes.replace(0, bytes.find("\nby a test"), "espalier-q-network 1 10 8 4");
  const absl::Status status = OpenPolicy(folder.Write("old.dqn", bytes), kRungs).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("old.dqn: a Q-network of another version"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("train it anew"));
}

TEST(PolicyFile, TheShippedOneIsTrainedForTheDefaultLoadLoss) {
  const absl::StatusOr<PolicyFile> file = OpenPolicy(PolicyPathOf(ESPALIER_LADDER), 9);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->trained.load_loss, LadderPolicyOptions{}.load_loss);
}

TEST(PolicyFile, LoadCostsNoMoreThanInTraining) {
  const TrainedFor trained{.load_loss = 0.2, .ttft_target_s = 1, .tpot_target_s = 0.1, .how = ""};
  const auto served = [&](double load_loss) {
    return LevelOptionsOf(trained,
                          {.ttft_target_s = 2, .tpot_target_s = 0.08, .load_loss = load_loss});
  };
  EXPECT_EQ(served(0.3).load_loss, 0.2);
  EXPECT_EQ(served(0.1).load_loss, 0.1);
  EXPECT_EQ(served(0.1).ttft_target_s, 2);
  EXPECT_EQ(served(0.1).tpot_target_s, 0.08);
}

}  // namespace
}  // namespace espalier
