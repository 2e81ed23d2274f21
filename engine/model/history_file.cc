#include "engine/model/history_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/gguf_writer.h"
#include "engine/model/own_file.h"

namespace espalier {
namespace {

constexpr std::string_view kArchitecture = "espalier-history";

std::string NameOf(int layer, const char* part) {
  return fmt::format("blk.{}.{}.weight", layer, part);
}
constexpr const char* kChannelsPart = "energy";
constexpr const char* kHeadsPart = "heads";

absl::Status Read(const OwnFile& file, const char* part, History* history) {
  const int columns = history->columns();
  std::vector<float> energy(static_cast<size_t>(history->buckets()) * columns);
  for (int layer = 0; layer < history->layers(); ++layer) {
    const std::string name = NameOf(layer, part);
    if (absl::Status status = file.Read(name, history->buckets(), columns, energy.data());
        !status.ok()) {
      return status;
    }
    if (!std::ranges::all_of(energy, [](float e) { return std::isfinite(e) && e >= 0; })) {
      return Mismatch(file.path, fmt::format("tensor {}", name), "means of squares",
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
  const absl::StatusOr<OwnFile> file =
      OwnFile::Open(path, kArchitecture, {}, model, FingerprintOf(model));
  if (!file.ok()) return file.status();
  SiteHistories read(model.config());
  absl::Status status = Read(*file, kChannelsPart, &read.channels);
  const bool has_heads = std::ranges::any_of(
      file->gguf.tensors, [](const StoredTensor& t) { return t.name == NameOf(0, kHeadsPart); });
  if (status.ok() && has_heads) status = Read(*file, kHeadsPart, &read.heads);
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
