#include "engine/model/files/model_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "engine/model/files/architecture.h"
#include "engine/model/files/checksum.h"
#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf_model.h"
#include "engine/model/files/hf_folder.h"
#include "engine/model/files/mapped_file.h"

namespace espalier {
namespace {

absl::StatusOr<std::unique_ptr<ModelFile>> OpenAnyFormat(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return OpenHfFolder(path);
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const std::string_view start = file->bytes().substr(0, 4);
  if (start != "GGUF") {
    return Mismatch(
        path, "model file", "GGUF or a folder with config.json",
        start.empty() ? "an empty file" : fmt::format("a file that starts with {}", Quoted(start)));
  }
  return OpenGguf(path, *std::move(file));
}

}  // namespace

void StoredTensor::ReadRow(int r, float* dst) const { Dequantize(type, row(r), cols, dst); }

absl::StatusOr<std::unique_ptr<ModelFile>> ModelFile::Open(const std::string& path) {
  absl::StatusOr<std::unique_ptr<ModelFile>> file = OpenAnyFormat(path);
  if (!file.ok()) return file;
  absl::Status status = CheckConfig(path, (*file)->config(), (*file)->vocabulary());
  if (status.ok()) status = CheckTensors(**file);
  if (!status.ok()) return status;
  if (const std::string& told = (*file)->checksum_; Damaged((*file)->tensors(), told)) {
    return Mismatch(path, "tensors",
                    fmt::format("their checksum to be {}, as written", Quoted(told)),
                    "another: the file is damaged");
  }
  return file;
}

absl::StatusOr<const StoredTensor*> ModelFile::Find(std::string_view name, int rows,
                                                    int cols) const {
  const auto found = std::ranges::lower_bound(tensors_, name, {}, &StoredTensor::name);
  if (found == tensors_.end() || found->name != name) {
    return absl::NotFoundError(fmt::format("{}: tensor {} is missing", path_, Quoted(name)));
  }
  if (found->rows != rows || found->cols != cols) {
    return Mismatch(path_, fmt::format("tensor {}", Quoted(name)),
                    fmt::format("{} x {} (rows x columns)", rows, cols),
                    fmt::format("{} x {}", found->rows, found->cols));
  }
  return &*found;
}

}  // namespace espalier
