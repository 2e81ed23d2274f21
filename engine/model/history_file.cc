#include "engine/model/history_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/gguf_writer.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/pruning_file.h"

namespace espalier {
namespace {

constexpr std::string_view kArchitecture = "espalier-history";

std::string EnergyName(int layer) { return fmt::format("blk.{}.energy.weight", layer); }

}  // namespace

absl::StatusOr<History> ReadHistory(const std::string& path, const ModelFile& model) {
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::StatusOr<Gguf> gguf = ParseGguf(path, file->bytes());
  if (!gguf.ok()) return gguf.status();
  if (absl::Status status = CheckOwn(path, *gguf, kArchitecture, model, FingerprintOf(model));
      !status.ok()) {
    return status;
  }
  const ModelConfig& config = model.config();
  History history(config.layers, config.channels);
  std::vector<float> energy(static_cast<size_t>(history.buckets()) * config.channels);
  for (int layer = 0; layer < config.layers; ++layer) {
    const std::string name = EnergyName(layer);
    const auto tensor =
        std::ranges::find_if(gguf->tensors, [&](const StoredTensor& t) { return t.name == name; });
    const std::string expected = fmt::format("F32 [{}, {}]", history.buckets(), config.channels);
    if (tensor == gguf->tensors.end()) {
      return Mismatch(path, fmt::format("tensor {}", name), expected, "none");
    }
    if (tensor->type != BlockType::kF32 || tensor->rows != history.buckets() ||
        tensor->cols != config.channels) {
      return Mismatch(
          path, fmt::format("tensor {}", name), expected,
          fmt::format("{} [{}, {}]", BlockTypeName(tensor->type), tensor->rows, tensor->cols));
    }
    for (int bucket = 0; bucket < history.buckets(); ++bucket) {
      tensor->ReadRow(bucket, energy.data() + static_cast<size_t>(bucket) * config.channels);
    }
    if (!std::ranges::all_of(energy, [](float e) { return std::isfinite(e) && e >= 0; })) {
      return Mismatch(path, fmt::format("tensor {}", name), "means of squares",
                      "a value that is negative or not finite");
    }
    history.Restore(layer, energy);
  }
  return history;
}

absl::Status WriteHistory(const std::string& path, const std::string& fingerprint,
                          const History& history) {
  GgufWriter writer;
  writer.Add("general.architecture", kArchitecture);
  writer.Add(kFingerprintKey, fingerprint);
  for (int layer = 0; layer < history.layers(); ++layer) {
    writer.AddTensor(EnergyName(layer), BlockType::kF32, history.buckets(), history.channels(),
                     std::as_bytes(history.Energies(layer)));
  }
  return writer.Write(path);
}

}  // namespace espalier
