// A Hugging Face model folder: config.json, safetensors in one file or in shards, the tokenizer.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"

namespace espalier {

// Tensors get their GGUF names; the rows of q and k stay as they are (half-split rotary pairs).
absl::StatusOr<std::unique_ptr<ModelFile>> OpenHfFolder(const std::string& folder);

}  // namespace espalier
