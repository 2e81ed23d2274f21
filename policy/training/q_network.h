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

  // A file's bytes: a line with name, version and shape, the parameters as little-endian floats,
  // and a checksum (FNV-1a, 64 bits) of all before it. `of` is a line of the caller's about what
  // the network is for; printable, no newline.
  std::string Format(std::string_view of) const;
  // None, with what is wrong in *error, if the bytes are no such file, are cut, or hold what is not
  // finite.
  static std::optional<QNetwork> Parse(std::string_view bytes, std::string* of, std::string* error);
  // Which file it is: its checksum, hexadecimal.
  static std::string Version(std::string_view bytes);

 private:
  QShape shape_;
  std::vector<float> parameters_;
};

}  // namespace espalier
