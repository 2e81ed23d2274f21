#include "engine/model/channel_moments_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/gguf_writer.h"
#include "engine/model/own_file.h"

namespace espalier {
namespace {

constexpr std::string_view kArchitecture = "espalier-channel-moments";
constexpr int64_t kMostSinks = int64_t{1} << 53;  // sums count them in doubles
constexpr int kTile = ChannelMoments::kTile;

std::array<std::pair<std::string_view, int>, 2> Dimensions(int layers, int channels) {
  return {{{"espalier.layers", layers}, {"espalier.channels", channels}}};
}

std::string TokensKey(int layer) { return fmt::format("espalier.tokens.{}", layer); }
std::string SinksKey(int layer) { return fmt::format("espalier.sinks.{}", layer); }

std::string TensorName(int layer, std::string_view what) {
  return fmt::format("blk.{}.ffn_down.{}", layer, what);
}

// That there are rows whose sums a layer's could be, with room for rounding.
absl::Status CheckSound(const std::string& path, const ChannelMoments& moments, int layer) {
  constexpr double kRoom = 1 + 1e-3, kLeast = 1e-30;  // whose squares float has as 0
  const ChannelMoments::Layer& of = moments.layer(layer);
  std::vector<double> squares;
  for (int i = 0; i < moments.channels(); ++i) {
    squares.push_back(moments.Product(layer, i, i));
    if (squares[i] < 0 ||
        of.sums[i] * of.sums[i] > static_cast<double>(of.tokens) * (kRoom * squares[i] + kLeast)) {
      return Mismatch(path, fmt::format("tensor {}", TensorName(layer, "products")),
                      fmt::format("sums that {} rows may have", of.tokens),
                      fmt::format("{} and {} of squares of channel {}", of.sums[i], squares[i], i));
    }
    for (int j = 0; j < i; ++j) {
      const double product = moments.Product(layer, i, j);
      if (product * product <= (kRoom * squares[i] + kLeast) * (kRoom * squares[j] + kLeast)) {
        continue;
      }
      return Mismatch(path, fmt::format("tensor {}", TensorName(layer, "products")),
                      fmt::format("sums that {} rows may have", of.tokens),
                      fmt::format("{} of channels {} and {}, and {} and {} of their squares",
                                  product, i, j, squares[i], squares[j]));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ChannelMoments> ReadChannelMoments(const std::string& path, const ModelFile& model) {
  const ModelConfig& config = model.config();
  const absl::StatusOr<OwnFile> file = OwnFile::Open(
      path, kArchitecture, Dimensions(config.layers, config.channels), model, FingerprintOf(model));
  if (!file.ok()) return file.status();
  GgufKeys keys(path, file->gguf);
  ChannelMoments moments(config.layers, config.channels);
  std::vector<float> sums(2 * static_cast<size_t>(config.channels));
  for (int layer = 0; layer < config.layers; ++layer) {
    ChannelMoments::Layer& of = moments.layer(layer);
    of.tokens = keys.Integer(TokensKey(layer), 0, ChannelMoments::kMostTokens);
    of.sinks.rows = keys.Integer(SinksKey(layer), 0, kMostSinks);
    absl::Status status = keys.status();
    if (status.ok()) {
      status = file->ReadSums(TensorName(layer, "sinks"), 1, config.channels, sums.data());
    }
    if (status.ok()) {
      std::copy_n(sums.begin(), config.channels, of.sinks.sums.begin());
      status = file->ReadSums(TensorName(layer, "sums"), 2, config.channels, sums.data());
    }
    if (status.ok()) {
      status = file->ReadSums(TensorName(layer, "products"), moments.tiles() * kTile, kTile,
                              of.products.data());
    }
    if (!status.ok()) return status;
    for (int j = 0; j < config.channels; ++j) {
      of.sums[j] = double{sums[j]} + sums[config.channels + j];
    }
    if (status = CheckSound(path, moments, layer); !status.ok()) return status;
  }
  return moments;
}

absl::Status WriteChannelMoments(const std::string& path, const std::string& fingerprint,
                                 const ChannelMoments& moments) {
  const int channels = moments.channels();
  GgufWriter writer;
  writer.Add("general.architecture", kArchitecture);
  writer.Add(kFingerprintKey, fingerprint);
  for (const auto& [key, value] : Dimensions(moments.layers(), channels)) {
    writer.Add(key, int64_t{value});
  }
  std::vector<std::vector<float>> sums(moments.layers());  // until they are written
  std::vector<std::vector<float>> sinks(moments.layers());
  for (int layer = 0; layer < moments.layers(); ++layer) {
    const ChannelMoments::Layer& of = moments.layer(layer);
    writer.Add(TokensKey(layer), of.tokens);
    AppendInTwo(of.sums, &sums[layer]);
    writer.Add(SinksKey(layer), of.sinks.rows);
    sinks[layer].assign(of.sinks.sums.begin(), of.sinks.sums.end());
    writer.AddTensor(TensorName(layer, "sinks"), BlockType::kF32, 1, channels,
                     std::as_bytes(std::span(sinks[layer])));
    writer.AddTensor(TensorName(layer, "sums"), BlockType::kF32, 2, channels,
                     std::as_bytes(std::span(sums[layer])));
    writer.AddTensor(TensorName(layer, "products"), BlockType::kF32, moments.tiles() * kTile, kTile,
                     std::as_bytes(std::span(of.products)));
  }
  return writer.Write(path);
}

}  // namespace espalier
