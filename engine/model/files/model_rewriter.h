// Writes a model file anew with other values in some of its matrices, one matrix at a time, so that
// neither file need fit in memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model/files/quant_blocks.h"

namespace espalier {

class ModelRewriter {
 public:
  // A GGUF becomes a GGUF at `out`, with all its metadata; a folder becomes a folder at `out` (or
  // at its parent, if `out` is FOLDER/model.safetensors), made if it is not there, with config and
  // tokenizer files copied into it and one file of weights. Tensors for which `replaced` holds get
  // new values, in `type`: kF32, kF16 or kBF16; all others are copied as they lie.
  //
  // The weights are written beside `out`, as PATH.new, which Finish renames and the destructor
  // removes: at `out` there is either nothing new or all of it, and what a killed process leaves
  // beside it opens as no model, for the header goes in last. Such a rest is written over, another
  // file of that name is not. A folder gets config and tokenizer with its weights, too. The file
  // has a checksum (checksum.h), so that damage is seen when it is opened. `file` must outlive the
  // rewriter.
  // InvalidArgument if `out` is of the other format, or is the model itself; FailedPrecondition if
  // PATH.new is somebody's; Unavailable, with the path and the system's words, if it cannot be
  // written.
  static absl::StatusOr<std::unique_ptr<ModelRewriter>> Create(
      const ModelFile& file, const std::string& out, BlockType type,
      const std::function<bool(const StoredTensor&)>& replaced);
  virtual ~ModelRewriter() = default;

  // The new values of a replaced tensor, [rows, cols]; each once.
  virtual absl::Status Write(const StoredTensor& tensor, std::span<const float> values) = 0;
  // FailedPrecondition, with its name, if a replaced tensor was not written.
  virtual absl::Status Finish() = 0;
};

}  // namespace espalier
