#include "policy/training/q_network.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

namespace espalier {
namespace {

constexpr std::string_view kName = "espalier-q-network ", kMagic = "espalier-q-network 2 ";
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

constexpr double kMostLoadLoss = 100, kMostTarget = 10'000;
constexpr size_t kMostHow = 1000;  // characters

// Shortest, so that it reads back to the same bits.
std::string Number(double value) {
  char text[32];
  return {text, std::to_chars(text, std::end(text), value).ptr};
}

std::string LineOf(const TrainedFor& trained) {
  return "load-loss " + Number(trained.load_loss) + " ttft-target " +
         Number(trained.ttft_target_s) + " tpot-target " + Number(trained.tpot_target_s);
}

// Of all but `how`.
bool InRange(const TrainedFor& trained) {
  return trained.load_loss >= 0 && trained.load_loss <= kMostLoadLoss &&
         trained.ttft_target_s > 0 && trained.ttft_target_s <= kMostTarget &&
         trained.tpot_target_s > 0 && trained.tpot_target_s <= kMostTarget;
}

bool IsHow(std::string_view line) {
  const auto printable = [](char each) { return each >= ' ' && each <= '~'; };
  return line.size() <= kMostHow && std::ranges::all_of(line, printable);
}

bool ReadTrainedFor(std::string_view line, TrainedFor* trained) {
  std::string_view rest = line;
  const auto read = [&](std::string_view name, double* value) {
    if (!rest.starts_with(name)) return false;
    rest.remove_prefix(name.size());
    const auto [stop, error] = std::from_chars(rest.data(), rest.data() + rest.size(), *value);
    if (error != std::errc()) return false;
    rest.remove_prefix(stop - rest.data());
    return true;
  };
  return read("load-loss ", &trained->load_loss) &&
         read(" ttft-target ", &trained->ttft_target_s) &&
         read(" tpot-target ", &trained->tpot_target_s) && InRange(*trained) &&
         LineOf(*trained) == line;
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

std::string QNetwork::Format(const TrainedFor& trained) const {
  if (!InRange(trained) || !IsHow(trained.how)) {
    std::fprintf(stderr, "a Q-network's file cannot tell that it was trained for \"%s\", \"%s\"\n",
                 LineOf(trained).c_str(), trained.how.c_str());
    std::abort();
  }
  std::string bytes(kMagic);
  for (const int count : {shape_.inputs, shape_.hidden, shape_.actions}) {
    bytes += std::to_string(count) + " ";
  }
  bytes.back() = '\n';
  bytes += LineOf(trained) + "\n" + trained.how + "\n";
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

std::optional<QNetwork> QNetwork::Parse(std::string_view bytes, TrainedFor* trained,
                                        std::string* error) {
  const auto fail = [&](std::string what) {
    *error = std::move(what);
    return std::nullopt;
  };
  std::string_view rest = bytes;
  const auto line = [&]() -> std::optional<std::string_view> {
    const size_t end = rest.find('\n');
    if (end == rest.npos) return std::nullopt;
    const std::string_view text = rest.substr(0, end);
    rest.remove_prefix(end + 1);
    return text;
  };
  const std::optional<std::string_view> first = line();
  if (first && first->starts_with(kName) && !first->starts_with(kMagic)) {
    return fail(
        "a Q-network of another version than 2; one of version 1 does not tell what it was "
        "trained for: train it anew");
  }
  if (!first || !first->starts_with(kMagic)) {
    return fail("no Q-network of version 2: its first line does not say so");
  }
  QShape shape;
  if (!ReadShape(first->substr(kMagic.size()), &shape)) {
    return fail("its first line tells no shape: INPUTS HIDDEN ACTIONS, each 1 to " +
                std::to_string(kMostUnits));
  }
  const std::optional<std::string_view> options = line();
  TrainedFor read;
  if (!options || !ReadTrainedFor(*options, &read)) {
    return fail(
        "its second line does not tell what it was trained for: load-loss NATS ttft-target "
        "SECONDS tpot-target SECONDS, in plain numbers");
  }
  const std::optional<std::string_view> how = line();
  if (!how || !IsHow(*how)) {
    return fail("its third line is none of at most " + std::to_string(kMostHow) +
                " printable characters");
  }
  QNetwork network(shape);
  const size_t begin = bytes.size() - rest.size(),
               length = network.parameters_.size() * sizeof(float);
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
  read.how = *how;
  *trained = std::move(read);
  return network;
}

}  // namespace espalier
