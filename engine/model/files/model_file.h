// A model on disk, opened and checked: GGUF v3 or a Hugging Face folder, memory-mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/files/quant_blocks.h"
#include "engine/model/text/vocabulary.h"
#include "engine/model_config.h"

namespace espalier {

// A tensor in the mapped file. Matrices are [out, in], rows of `in` values contiguous.
struct StoredTensor {
  std::string name;  // canonical (GGUF) name, e.g. "blk.0.attn_q.weight"
  BlockType type = BlockType::kF32;
  int rows = 1;  // 1 for vectors
  int cols = 0;
  const std::byte* data = nullptr;
  size_t bytes = 0;

  // Row r as stored, bytes / rows of them.
  const std::byte* row(int r) const { return data + bytes / rows * r; }
  // Its values, dequantised exactly. dst holds cols floats.
  void ReadRow(int r, float* dst) const;
};

class ModelFile {
 public:
  virtual ~ModelFile() = default;

  // `path`: a .gguf file, or a folder with config.json, *.safetensors and tokenizer.json. Every
  // size and offset is checked against the file before use, and the tensors against a checksum if
  // the file has one (checksum.h). An error is one line: file, tensor or key, expected, got.
  static absl::StatusOr<std::unique_ptr<ModelFile>> Open(const std::string& path);

  const ModelConfig& config() const { return config_; }
  const Vocabulary& vocabulary() const { return vocabulary_; }
  const std::string& path() const { return path_; }

  // NotFound, with file and name, if absent; InvalidArgument if the shape is not rows x cols.
  absl::StatusOr<const StoredTensor*> Find(std::string_view name, int rows, int cols) const;
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  // Where they lie; none if in memory.
  virtual std::vector<const MappedFile*> files() const { return {}; }

 protected:
  std::string path_;
  ModelConfig config_;
  Vocabulary vocabulary_;
  std::vector<StoredTensor> tensors_;  // sorted by name
  std::string checksum_;               // as the file has it; empty if it has none
};

}  // namespace espalier
