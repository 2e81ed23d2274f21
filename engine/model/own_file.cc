#include "engine/model/own_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "engine/model/files/file_error.h"

namespace espalier {
namespace {

// FNV-1a of the tensors that count.
std::string Fingerprint(const ModelFile& model, bool (*counts)(const StoredTensor&)) {
  constexpr size_t kEnd = 256;
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](std::string_view bytes) {
    for (const char c : bytes) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  };
  for (const StoredTensor& tensor : model.tensors()) {
    if (!counts(tensor)) continue;
    add(fmt::format("{} {} {} {};", tensor.name, BlockTypeName(tensor.type), tensor.rows,
                    tensor.cols));
    const std::string_view data(reinterpret_cast<const char*>(tensor.data), tensor.bytes);
    add(data.substr(0, kEnd));
    add(data.substr(data.size() - std::min(data.size(), kEnd)));
  }
  return fmt::format("{:016x}", hash);
}

// That a file of ours is of this architecture and model; names the key if it is not.
absl::Status CheckOwn(const std::string& path, const Gguf& gguf, std::string_view architecture,
                      const ModelFile& model, std::string_view fingerprint) {
  GgufKeys keys(path, gguf);
  const std::string_view theirs = keys.String("general.architecture");
  const std::string_view made_for = keys.String(kFingerprintKey);
  if (!keys.status().ok()) return keys.status();
  if (theirs != architecture) {
    return Mismatch(path, "general.architecture", architecture, Quoted(theirs));
  }
  if (made_for == fingerprint) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("{}: made for another model: its fingerprint is {}, that of {} is {}", path,
                  Quoted(made_for), model.path(), fingerprint));
}

}  // namespace

std::string FingerprintOf(const ModelFile& model) {
  return Fingerprint(model, [](const StoredTensor&) { return true; });
}

std::string LineageOf(const ModelFile& model) {
  return Fingerprint(model, [](const StoredTensor& tensor) {
    return tensor.rows == 1 || !tensor.name.starts_with("blk.");
  });
}

absl::StatusOr<OwnFile> OwnFile::Open(const std::string& path, std::string_view architecture,
                                      std::span<const std::pair<std::string_view, int>> dimensions,
                                      const ModelFile& model, std::string_view fingerprint) {
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<Gguf> gguf = ParseGguf(path, file->bytes());
  if (!gguf.ok()) return gguf.status();
  GgufKeys keys(path, *gguf);
  if (keys.String("general.architecture", "") == architecture) {
    for (const auto& [key, value] : dimensions) keys.Integer(key, value, value);
  }
  if (!keys.status().ok()) return keys.status();
  if (absl::Status status = CheckOwn(path, *gguf, architecture, model, fingerprint); !status.ok()) {
    return status;
  }
  return OwnFile{.path = path, .file = *std::move(file), .gguf = *std::move(gguf)};
}

absl::Status OwnFile::Read(const std::string& name, int rows, int cols, float* to) const {
  const auto tensor = std::ranges::find(gguf.tensors, name, &StoredTensor::name);
  if (tensor == gguf.tensors.end()) {
    return Mismatch(path, fmt::format("tensor {}", name), fmt::format("F32 [{}, {}]", rows, cols),
                    "none");
  }
  if (absl::Status status = CheckShape(path, *tensor, BlockType::kF32, rows, cols); !status.ok()) {
    return status;
  }
  for (int r = 0; r < rows; ++r) tensor->ReadRow(r, to + int64_t{r} * cols);
  return absl::OkStatus();
}

absl::Status OwnFile::ReadSums(const std::string& name, int rows, int cols, float* to) const {
  if (absl::Status status = Read(name, rows, cols, to); !status.ok()) return status;
  const std::span values(to, static_cast<size_t>(rows) * cols);
  if (std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
    return absl::OkStatus();
  }
  return Mismatch(path, fmt::format("tensor {}", name), "finite sums", "an infinity or NaN");
}

absl::Status CheckShape(const std::string& path, const StoredTensor& tensor, BlockType type,
                        int rows, int cols) {
  if (tensor.type == type && tensor.rows == rows && tensor.cols == cols) return absl::OkStatus();
  return Mismatch(path, fmt::format("tensor {}", tensor.name),
                  fmt::format("{} [{}, {}]", BlockTypeName(type), rows, cols),
                  fmt::format("{} [{}, {}]", BlockTypeName(tensor.type), tensor.rows, tensor.cols));
}

void AppendInTwo(std::span<const double> values, std::vector<float>* rows) {
  for (const double value : values) rows->push_back(static_cast<float>(value));
  for (const double value : values) {
    rows->push_back(static_cast<float>(value - double{static_cast<float>(value)}));
  }
}

}  // namespace espalier
