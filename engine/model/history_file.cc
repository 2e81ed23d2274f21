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

std::string NameOf(int layer, const char* part) {
  return fmt::format("blk.{}.{}.weight", layer, part);
}
constexpr const char* kChannelsPart = "energy";
constexpr const char* kHeadsPart = "heads";

absl::Status Read(const std::string& path, const Gguf& gguf, const char* part, History* history) {
  const int columns = history->columns();
  std::vector<float> energy(static_cast<size_t>(history->buckets()) * columns);
  for (int layer = 0; layer < history->layers(); ++layer) {
    const std::string name = NameOf(layer, part);
    const auto tensor =
        std::ranges::find_if(gguf.tensors, [&](const StoredTensor& t) { return t.name == name; });
    const std::string expected = fmt::format("F32 [{}, {}]", history->buckets(), columns);
    if (tensor == gguf.tensors.end()) {
      return Mismatch(path, fmt::format("tensor {}", name), expected, "none");
    }
    if (tensor->type != BlockType::kF32 || tensor->rows != history->buckets() ||
        tensor->cols != columns) {
      return Mismatch(
          path, fmt::format("tensor {}", name), expected,
          fmt::format("{} [{}, {}]", BlockTypeName(tensor->type), tensor->rows, tensor->cols));
    }
    for (int bucket = 0; bucket < history->buckets(); ++bucket) {
      tensor->ReadRow(bucket, energy.data() + static_cast<size_t>(bucket) * columns);
    }
    if (!std::ranges::all_of(energy, [](float e) { return std::isfinite(e) && e >= 0; })) {
      return Mismatch(path, fmt::format("tensor {}", name), "means of squares",
                      "a value that is negative or not finite");
    }
    history->Restore(layer, energy);
  }
  return absl::OkStatus();
}

void Add(const History& history, const char* part, GgufWriter* writer) {
  for (int layer = 0; layer < history.layers(); ++layer) {
    writer->AddTensor(NameOf(layer, part), BlockType::kF32, history.buckets(), history.columns(),
                      std::as_bytes(history.Energies(layer)));
  }
}

}  // namespace

absl::StatusOr<SiteHistories> ReadHistory(const std::string& path, const ModelFile& model) {
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::StatusOr<Gguf> gguf = ParseGguf(path, file->bytes());
  if (!gguf.ok()) return gguf.status();
  if (absl::Status status = CheckOwn(path, *gguf, kArchitecture, model, FingerprintOf(model));
      !status.ok()) {
    return status;
  }
  SiteHistories read(model.config());
  absl::Status status = Read(path, *gguf, kChannelsPart, &read.channels);
  const bool has_heads = std::ranges::any_of(
      gguf->tensors, [](const StoredTensor& t) { return t.name == NameOf(0, kHeadsPart); });
  if (status.ok() && has_heads) status = Read(path, *gguf, kHeadsPart, &read.heads);
  if (!status.ok()) return status;
  return read;
}

absl::Status WriteHistory(const std::string& path, const std::string& fingerprint,
                          const History& channels, const History& heads) {
  GgufWriter writer;
  writer.Add("general.architecture", kArchitecture);
  writer.Add(kFingerprintKey, fingerprint);
  Add(channels, kChannelsPart, &writer);
  Add(heads, kHeadsPart, &writer);
  return writer.Write(path);
}

}  // namespace espalier
