#include "engine/model/channel_moments_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/gguf_writer.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/pruning_file.h"

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

// A tensor's values to `to`, if it has `rows` rows of `cols`.
absl::Status ReadFloats(const std::string& path, const Gguf& gguf, const std::string& name,
                        int rows, int cols, float* to) {
  const auto tensor = std::ranges::find(gguf.tensors, name, &StoredTensor::name);
  const std::string where = fmt::format("tensor {}", name);
  const std::string expected = fmt::format("F32 [{}, {}]", rows, cols);
  if (tensor == gguf.tensors.end()) return Mismatch(path, where, expected, "none");
  if (tensor->type != BlockType::kF32 || tensor->rows != rows || tensor->cols != cols) {
    return Mismatch(
        path, where, expected,
        fmt::format("{} [{}, {}]", BlockTypeName(tensor->type), tensor->rows, tensor->cols));
  }
  for (int r = 0; r < rows; ++r) tensor->ReadRow(r, to + int64_t{r} * cols);
  if (!std::all_of(to, to + int64_t{rows} * cols, [](float v) { return std::isfinite(v); })) {
    return Mismatch(path, where, "finite sums", "an infinity or NaN");
  }
  return absl::OkStatus();
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
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::StatusOr<Gguf> gguf = ParseGguf(path, file->bytes());
  if (!gguf.ok()) return gguf.status();
  const ModelConfig& config = model.config();
  GgufKeys keys(path, *gguf);
  // A fingerprint says that models differ; their dimensions, if those do, say how.
  if (keys.String("general.architecture", "") == kArchitecture) {
    for (const auto& [key, value] : Dimensions(config.layers, config.channels)) {
      keys.Integer(key, value, value);
    }
  }
  if (!keys.status().ok()) return keys.status();
  if (absl::Status status = CheckOwn(path, *gguf, kArchitecture, model, FingerprintOf(model));
      !status.ok()) {
    return status;
  }
  ChannelMoments moments(config.layers, config.channels);
  std::vector<float> sums(2 * static_cast<size_t>(config.channels));
  for (int layer = 0; layer < config.layers; ++layer) {
    ChannelMoments::Layer& of = moments.layer(layer);
    of.tokens = keys.Integer(TokensKey(layer), 0, ChannelMoments::kMostTokens);
    of.sinks.rows = keys.Integer(SinksKey(layer), 0, kMostSinks);
    absl::Status status = keys.status();
    if (status.ok()) {
      status = ReadFloats(path, *gguf, TensorName(layer, "sinks"), 1, config.channels, sums.data());
    }
    std::copy_n(sums.begin(), config.channels, of.sinks.sums.begin());
    if (status.ok()) {
      status = ReadFloats(path, *gguf, TensorName(layer, "sums"), 2, config.channels, sums.data());
    }
    if (status.ok()) {
      status = ReadFloats(path, *gguf, TensorName(layer, "products"), moments.tiles() * kTile,
                          kTile, of.products.data());
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
    for (const double sum : of.sums) sums[layer].push_back(static_cast<float>(sum));
    for (const double sum : of.sums) {
      sums[layer].push_back(static_cast<float>(sum - double{static_cast<float>(sum)}));
    }
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
