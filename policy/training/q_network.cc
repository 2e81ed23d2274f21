#include "policy/training/q_network.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>

namespace espalier {
namespace {

constexpr std::string_view kMagic = "espalier-q-network 1 ";
constexpr int kMostUnits = 4096;  // of a layer: a file cannot ask for much memory

static_assert(std::endian::native == std::endian::little, "parameters are written as they lie");

uint64_t Checksum(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char byte : bytes) hash = (hash ^ static_cast<uint8_t>(byte)) * 0x100000001b3;
  return hash;
}

double Uniform(std::mt19937_64* random) { return static_cast<double>((*random)() >> 11) * 0x1p-53; }

// "68 128 61": three counts in [1, kMostUnits].
bool ReadShape(std::string_view text, QShape* shape) {
  for (int* count : {&shape->inputs, &shape->hidden, &shape->actions}) {
    while (text.starts_with(' ')) text.remove_prefix(1);
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), *count);
    if (error != std::errc() || *count < 1 || *count > kMostUnits) return false;
    text.remove_prefix(stop - text.data());
  }
  return text.empty();
}

}  // namespace

QNetwork::QNetwork(const QShape& shape)
    : shape_(shape),
      parameters_(size_t{1} * shape.hidden * (shape.inputs + 1) +
                  size_t{1} * shape.actions * (shape.hidden + 1)) {}

QNetwork::QNetwork(const QShape& shape, std::mt19937_64* random) : QNetwork(shape) {
  const auto fill = [&](int begin, int end, int inputs) {
    const double bound = std::sqrt(6.0 / inputs);
    for (int i = begin; i < end; ++i) {
      parameters_[i] = static_cast<float>(bound * (2 * Uniform(random) - 1));
    }
  };
  fill(0, hidden_bias(), shape.inputs);
  fill(output(), output_bias(), shape.hidden);
}

// Sums run over inputs in their order, side by side for all outputs, which compilers vectorise.
void QNetwork::Values(std::span<const float> state, std::span<float> hidden,
                      std::span<float> values) const {
  const float* weights = parameters_.data();
  std::copy_n(weights + hidden_bias(), shape_.hidden, hidden.begin());
  for (int i = 0; i < shape_.inputs; ++i, weights += shape_.hidden) {
    for (int h = 0; h < shape_.hidden; ++h) hidden[h] += weights[h] * state[i];
  }
  for (int h = 0; h < shape_.hidden; ++h) hidden[h] = std::max(0.0F, hidden[h]);
  weights = parameters_.data() + output();
  std::copy_n(parameters_.data() + output_bias(), shape_.actions, values.begin());
  for (int h = 0; h < shape_.hidden; ++h, weights += shape_.actions) {
    for (int a = 0; a < shape_.actions; ++a) values[a] += weights[a] * hidden[h];
  }
}

std::string QNetwork::Format(std::string_view of) const {
  std::string bytes(kMagic);
  for (const int count : {shape_.inputs, shape_.hidden, shape_.actions}) {
    bytes += std::to_string(count) + " ";
  }
  bytes.back() = '\n';
  bytes.append(of) += '\n';
  bytes.append(reinterpret_cast<const char*>(parameters_.data()),
               parameters_.size() * sizeof(float));
  const uint64_t sum = Checksum(bytes);
  bytes.append(reinterpret_cast<const char*>(&sum), sizeof(sum));
  return bytes;
}

std::string QNetwork::Version(std::string_view bytes) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  const uint64_t sum = Checksum(bytes);
  for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[sum >> shift & 15];
  return text;
}

std::optional<QNetwork> QNetwork::Parse(std::string_view bytes, std::string* of,
                                        std::string* error) {
  const auto fail = [&](std::string what) {
    *error = std::move(what);
    return std::nullopt;
  };
  const size_t first = bytes.find('\n');
  const size_t second = first == bytes.npos ? bytes.npos : bytes.find('\n', first + 1);
  if (!bytes.starts_with(kMagic) || second == bytes.npos) {
    return fail("no Q-network of version 1: its first line does not say so");
  }
  QShape shape;
  if (!ReadShape(bytes.substr(kMagic.size(), first - kMagic.size()), &shape)) {
    return fail("its first line tells no shape: INPUTS HIDDEN ACTIONS, each 1 to " +
                std::to_string(kMostUnits));
  }
  QNetwork network(shape);
  const size_t begin = second + 1, length = network.parameters_.size() * sizeof(float);
  uint64_t sum = 0;
  if (bytes.size() != begin + length + sizeof(sum)) {
    return fail("it has " + std::to_string(bytes.size()) + " bytes, its shape takes " +
                std::to_string(begin + length + sizeof(sum)));
  }
  std::memcpy(&sum, bytes.data() + begin + length, sizeof(sum));
  if (sum != Checksum(bytes.substr(0, begin + length))) {
    return fail("its checksum is of other bytes: it was changed or cut");
  }
  std::memcpy(network.parameters_.data(), bytes.data() + begin, length);
  for (const float parameter : network.parameters_) {
    if (!std::isfinite(parameter)) return fail("it has a parameter that is not finite");
  }
  *of = bytes.substr(first + 1, second - first - 1);
  return network;
}

}  // namespace espalier
