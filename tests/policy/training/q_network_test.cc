#include "policy/training/q_network.h"

#include <limits>
#include <random>
#include <string>
#include <vector>

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
    bytes_ = network_.Format("a ladder of 4 rungs");
  }

  std::string ErrorOf(const std::string& bytes) {
    std::string of, error;
    EXPECT_FALSE(QNetwork::Parse(bytes, &of, &error).has_value());
    return error;
  }

  QNetwork network_{{.inputs = 1, .hidden = 1, .actions = 1}};
  std::string bytes_;
};

TEST_F(QNetworkFile, ReadsWhatItWrote) {
  std::string of, error;
  const auto read = QNetwork::Parse(bytes_, &of, &error);
  ASSERT_TRUE(read.has_value()) << error;
  EXPECT_EQ(of, "a ladder of 4 rungs");
  EXPECT_EQ(read->shape(), network_.shape());
  EXPECT_EQ(read->Format(of), bytes_);
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
  EXPECT_EQ(ErrorOf(network_.Format("")), "it has a parameter that is not finite");
}

TEST_F(QNetworkFile, RefusesShapesOutOfRange) {
  for (const char* shape : {"0 1 1", "1 1", "1 1 1 1", "5000 1 1", "1 x 1", "-1 2 2"}) {
    EXPECT_NE(ErrorOf(std::string("espalier-q-network 1 ") + shape + "\n\n"), "") << shape;
  }
}

}  // namespace
}  // namespace espalier
