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
#include "engine/model/own_file.h"

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
  const ModelConfig& config = model.config();
  const absl::StatusOr<OwnFile> file =
      OwnFile::Open(path, kArchitecture, Dimensions(config), model, LineageOf(model));
  if (!file.ok()) return file.status();
  GgufKeys keys(path, file->gguf);
  const int64_t tokens = keys.Integer(kTokensKey, 0, kMostTokens);
  if (!keys.status().ok()) return keys.status();

  InputMoments moments(config);
  std::vector<double> sums, squares;
  std::vector<float> rows;  // [kRows, columns]
  for (int layer = 0; layer < config.layers; ++layer) {
    for (size_t input = 0; input < kMatrixInputNames.size(); ++input) {
      ColumnMoments& of = moments.of(layer, static_cast<MatrixInput>(input));
      const std::string name = TensorName(layer, input);
      const auto columns = static_cast<size_t>(of.columns());
      rows.resize(kRows * columns);
      if (absl::Status status = file->ReadSums(name, kRows, of.columns(), rows.data());
          !status.ok()) {
        return status;
      }
      sums.resize(of.columns());
      squares.resize(of.columns());
      for (int j = 0; j < of.columns(); ++j) {
        sums[j] = double{rows[j]} + rows[columns + j];
        squares[j] = double{rows[2 * columns + j]} + rows[3 * columns + j];
      }
      for (int j = 0; j < of.columns(); ++j) {
        // With room for rounding: no sum is larger than its squares allow.
        const bool sound =
            squares[j] >= 0 && squares[j] <= std::numeric_limits<float>::max() &&
            sums[j] * sums[j] <= (1 + 1e-3) * static_cast<double>(tokens) * squares[j];
        if (!sound) {
          return Mismatch(path, fmt::format("tensor {}", name),
                          fmt::format("sums that {} rows may have", tokens),
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
      AppendInTwo(of.sums(), &values);
      AppendInTwo(of.squares(), &values);
      writer.AddTensor(TensorName(layer, input), BlockType::kF32, kRows, of.columns(),
                       std::as_bytes(std::span(values)));
    }
  }
  return writer.Write(path);
}

}  // namespace espalier
