#include "policy/training/q_network.h"

#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

TEST(QNetwork, ValuesByHand) {
  QNetwork network({.inputs = 2, .hidden = 2, .actions = 1});
  const std::vector<float> parameters = {1, -1, 2,          0, /*biases*/ 0.5F, 0,  //
                                         3, 4,  /*bias*/ -1};
  std::copy(parameters.begin(), parameters.end(), network.parameters().begin());
  std::vector<float> hidden(2), values(1);
  network.Values(std::vector<float>{2, 1}, hidden, values);
  EXPECT_EQ(hidden, (std::vector<float>{4.5F, 0}));  // -2 is rectified
  EXPECT_EQ(values[0], 3 * 4.5F - 1);
}

class QNetworkFile : public testing::Test {
 protected:
  QNetworkFile() {
    std::mt19937_64 random(3);
    network_ = QNetwork({.inputs = 3, .hidden = 5, .actions = 4}, &random);
    bytes_ = network_.Format(trained_);
  }

  std::string ErrorOf(const std::string& bytes) {
    TrainedFor trained;
    std::string error;
    EXPECT_FALSE(QNetwork::Parse(bytes, &trained, &error).has_value());
    EXPECT_EQ(trained, TrainedFor{}) << "of a file that was refused";
    return error;
  }

  const TrainedFor trained_{
      .load_loss = 0.2, .ttft_target_s = 2, .tpot_target_s = 0.08, .how = "a ladder of 4 rungs"};
  QNetwork network_{{.inputs = 1, .hidden = 1, .actions = 1}};
  std::string bytes_;
};

TEST_F(QNetworkFile, ReadsWhatItWrote) {
  TrainedFor trained;
  std::string error;
  const auto read = QNetwork::Parse(bytes_, &trained, &error);
  ASSERT_TRUE(read.has_value()) << error;
  EXPECT_EQ(trained, trained_);
  EXPECT_EQ(read->shape(), network_.shape());
  EXPECT_EQ(read->Format(trained), bytes_);
  EXPECT_TRUE(bytes_.starts_with(
      "espalier-q-network 2 3 5 4\nload-loss 0.2 ttft-target 2 tpot-target 0.08\n"
      "a ladder of 4 rungs\n"));
}

TEST_F(QNetworkFile, WritesNothingThatItWouldNotRead) {
  for (const std::string& how : {std::string("two\nlines"), std::string("a\tb"),
                                 std::string("\xC3\xA9"), std::string(1001, 'a')}) {
    EXPECT_DEATH(network_.Format({.how = how}), "cannot tell that it was trained for");
  }
  EXPECT_DEATH(network_.Format({.load_loss = std::numeric_limits<double>::infinity()}),
               "load-loss inf");
  EXPECT_DEATH(network_.Format({.ttft_target_s = 0}), "ttft-target 0");
}

TEST_F(QNetworkFile, RefusesAnyChangedByte) {
  for (size_t i = 0; i < bytes_.size(); ++i) {
    std::string changed = bytes_;
    changed[i] = static_cast<char>(changed[i] ^ 1);
    EXPECT_NE(ErrorOf(changed), "") << i;
  }
}

TEST_F(QNetworkFile, RefusesAnyOtherLength) {
  for (size_t length = 0; length < bytes_.size(); ++length) {
    EXPECT_NE(ErrorOf(bytes_.substr(0, length)), "") << length;
  }
  EXPECT_NE(ErrorOf(bytes_ + "x"), "");
}

TEST_F(QNetworkFile, RefusesWhatIsNotFinite) {
  network_.parameters()[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(ErrorOf(network_.Format({})), "it has a parameter that is not finite");
}

TEST_F(QNetworkFile, RefusesShapesOutOfRange) {
  for (const char* shape : {"0 1 1", "1 1", "1 1 1 1", "5000 1 1", "1 x 1", "-1 2 2"}) {
    EXPECT_NE(ErrorOf(std::string("espalier-q-network 2 ") + shape + "\n\n\n"), "") << shape;
  }
}

TEST_F(QNetworkFile, RefusesTheVersionThatDoesNotTellItsLoadLoss) {
  EXPECT_THAT(ErrorOf("espalier-q-network 1 3 5 4\nrungs 4 load-loss 0.25\n"),
              testing::HasSubstr("of version 1 does not tell what it was trained for"));
  EXPECT_THAT(ErrorOf("espalier-ladder 1\n"), testing::HasSubstr("no Q-network of version 2"));
}

TEST_F(QNetworkFile, RefusesWhatItCannotHaveBeenTrainedFor) {
  for (const char* options :
       {"", "load-loss 0.2", "load-loss -1 ttft-target 1 tpot-target 1",
        "load-loss 101 ttft-target 1 tpot-target 1", "load-loss nan ttft-target 1 tpot-target 1",
        "load-loss 0.2 ttft-target 0 tpot-target 1", "load-loss 0.2 ttft-target 1 tpot-target inf",
        "load-loss 0.2 ttft-target 1e9 tpot-target 1", "load-loss 0.20 ttft-target 1 tpot-target 1",
        "load-loss 1e999 ttft-target 1 tpot-target 1", "load-loss 0.2 ttft-target 1 tpot-target 1 ",
        "load-loss  0.2 ttft-target 1 tpot-target 1",
        "ttft-target 1 load-loss 0.2 tpot-target 1"}) {
    EXPECT_THAT(ErrorOf(std::string("espalier-q-network 2 1 1 1\n") + options + "\n\n"),
                testing::HasSubstr("second line"))
        << options;
  }
  const std::string begin =
      "espalier-q-network 2 1 1 1\nload-loss 0.2 ttft-target 1 tpot-target 1\n";
  EXPECT_THAT(ErrorOf(begin + "a\tb\n"), testing::HasSubstr("third line"));
  EXPECT_THAT(ErrorOf(begin + std::string(1001, 'a') + "\n"), testing::HasSubstr("third line"));
  EXPECT_THAT(ErrorOf(begin + std::string(1000, 'a') + "\n"), testing::HasSubstr("bytes"));
}

}  // namespace
}  // namespace espalier
