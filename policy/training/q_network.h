// A Q-network: a multilayer perceptron of one hidden layer that values each action in a state.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace espalier {

struct QShape {
  int inputs = 0;   // of a state
  int hidden = 0;   // rectified
  int actions = 0;  // outputs

  bool operator==(const QShape&) const = default;
};

// What a serving policy's network was trained for.
struct TrainedFor {
  double load_loss = 0;      // nats per token, as LadderPolicyOptions; in [0, 100]
  double ttft_target_s = 1;  // targets: above 0, at most 10,000
  double tpot_target_s = 0.1;
  std::string how;  // a line about it; printable ASCII, at most 1,000 characters

  bool operator==(const TrainedFor&) const = default;
};

class QNetwork {
 public:
  // All weights zero.
  explicit QNetwork(const QShape& shape);
  // He-uniform weights, biases zero.
  QNetwork(const QShape& shape, std::mt19937_64* random);

  const QShape& shape() const { return shape_; }

  // values [actions] = the network's of `state` [inputs]; `hidden` [hidden] is scratch and holds
  // the rectified layer afterwards. Allocates nothing.
  void Values(std::span<const float> state, std::span<float> hidden, std::span<float> values) const;

  // [inputs, hidden], [hidden], [hidden, actions], [actions]: weights and biases of both layers,
  // one behind the other.
  std::span<float> parameters() { return parameters_; }
  std::span<const float> parameters() const { return parameters_; }

  // Offsets into parameters().
  int hidden_bias() const { return shape_.hidden * shape_.inputs; }
  int output() const { return hidden_bias() + shape_.hidden; }
  int output_bias() const { return output() + shape_.actions * shape_.hidden; }

  // A file's bytes: a line with name, version and shape, one of what it was trained for ("load-loss
  // 0.2 ttft-target 1 tpot-target 0.1"), one of how, the parameters as little-endian floats, and a
  // checksum (FNV-1a, 64 bits) of all before it. Crashes if `trained` is out of range, which Parse
  // would refuse.
  std::string Format(const TrainedFor& trained) const;
  // None, with what is wrong in *error, if the bytes are no such file, are of another version, cut,
  // or hold what is not finite or out of its range. Another spelling of a number is none.
  static std::optional<QNetwork> Parse(std::string_view bytes, TrainedFor* trained,
                                       std::string* error);
  // Which file it is: its checksum, hexadecimal.
  static std::string Version(std::string_view bytes);

 private:
  QShape shape_;
  std::vector<float> parameters_;
};

}  // namespace espalier
