#include "engine/model/moments_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/gguf_writer.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/pruning_file.h"

namespace espalier {
namespace {

constexpr std::string_view kArchitecture = "espalier-moments";
constexpr std::string_view kTokensKey = "espalier.tokens";
constexpr int64_t kMostTokens = int64_t{1} << 53;  // sums count them in doubles
constexpr int kRows = 4;

// What of a model's dimensions the sums depend on.
std::array<std::pair<std::string_view, int>, 4> Dimensions(const ModelConfig& config) {
  return {{{"espalier.layers", config.layers},
           {"espalier.hidden", config.hidden},
           {"espalier.attention", config.heads * config.head_dim},
           {"espalier.channels", config.channels}}};
}

std::string TensorName(int layer, size_t input) {
  return fmt::format("blk.{}.{}.moments", layer, kMatrixInputNames[input]);
}

}  // namespace

absl::StatusOr<InputMoments> ReadMoments(const std::string& path, const ModelFile& model) {
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::StatusOr<Gguf> gguf = ParseGguf(path, file->bytes());
  if (!gguf.ok()) return gguf.status();
  const ModelConfig& config = model.config();
  GgufKeys keys(path, *gguf);
  // A fingerprint says that models differ; their dimensions, if those do, say how.
  if (keys.String("general.architecture", "") == kArchitecture) {
    for (const auto& [key, value] : Dimensions(config)) keys.Integer(key, value, value);
  }
  if (!keys.status().ok()) return keys.status();
  if (absl::Status status = CheckOwn(path, *gguf, kArchitecture, model, LineageOf(model));
      !status.ok()) {
    return status;
  }
  const int64_t tokens = keys.Integer(kTokensKey, 0, kMostTokens);
  if (!keys.status().ok()) return keys.status();

  InputMoments moments(config);
  std::vector<double> sums, squares;
  std::vector<float> rows[kRows];
  for (int layer = 0; layer < config.layers; ++layer) {
    for (size_t input = 0; input < kMatrixInputNames.size(); ++input) {
      ColumnMoments& of = moments.of(layer, static_cast<MatrixInput>(input));
      const std::string name = TensorName(layer, input);
      const auto tensor = std::ranges::find(gguf->tensors, name, &StoredTensor::name);
      const std::string expected = fmt::format("F32 [{}, {}]", kRows, of.columns());
      const std::string where = fmt::format("tensor {}", name);
      if (tensor == gguf->tensors.end()) return Mismatch(path, where, expected, "none");
      if (tensor->type != BlockType::kF32 || tensor->rows != kRows ||
          tensor->cols != of.columns()) {
        return Mismatch(
            path, where, expected,
            fmt::format("{} [{}, {}]", BlockTypeName(tensor->type), tensor->rows, tensor->cols));
      }
      for (int r = 0; r < kRows; ++r) {
        rows[r].resize(of.columns());
        tensor->ReadRow(r, rows[r].data());
        if (!std::ranges::all_of(rows[r], [](float value) { return std::isfinite(value); })) {
          return Mismatch(path, where, "finite sums", "an infinity or NaN");
        }
      }
      sums.resize(of.columns());
      squares.resize(of.columns());
      for (int j = 0; j < of.columns(); ++j) {
        sums[j] = double{rows[0][j]} + rows[1][j];
        squares[j] = double{rows[2][j]} + rows[3][j];
      }
      for (int j = 0; j < of.columns(); ++j) {
        // With room for rounding: no sum is larger than its squares allow.
        const bool sound =
            squares[j] >= 0 && squares[j] <= std::numeric_limits<float>::max() &&
            sums[j] * sums[j] <= (1 + 1e-3) * static_cast<double>(tokens) * squares[j];
        if (!sound) {
          return Mismatch(path, where, fmt::format("sums that {} rows may have", tokens),
                          fmt::format("{} and {} of squares in column {}", sums[j], squares[j], j));
        }
      }
      of.Restore(tokens, sums, squares);
    }
  }
  return moments;
}

absl::Status WriteMoments(const std::string& path, const std::string& lineage,
                          const ModelConfig& config, const InputMoments& moments) {
  GgufWriter writer;
  writer.Add("general.architecture", kArchitecture);
  writer.Add(kFingerprintKey, lineage);
  for (const auto& [key, value] : Dimensions(config)) writer.Add(key, int64_t{value});
  writer.Add(kTokensKey, moments.tokens());
  std::vector<std::vector<float>> tensors;  // until they are written
  tensors.reserve(moments.layers() * kMatrixInputNames.size());
  for (int layer = 0; layer < moments.layers(); ++layer) {
    for (size_t input = 0; input < kMatrixInputNames.size(); ++input) {
      const ColumnMoments& of = moments.of(layer, static_cast<MatrixInput>(input));
      std::vector<float>& values = tensors.emplace_back();
      values.reserve(static_cast<size_t>(kRows) * of.columns());
      for (const std::span<const double> sums : {of.sums(), of.squares()}) {
        for (const double sum : sums) values.push_back(static_cast<float>(sum));
        for (const double sum : sums) {
          values.push_back(static_cast<float>(sum - double{static_cast<float>(sum)}));
        }
      }
      writer.AddTensor(TensorName(layer, input), BlockType::kF32, kRows, of.columns(),
                       std::as_bytes(std::span(values)));
    }
  }
  return writer.Write(path);
}

}  // namespace espalier
