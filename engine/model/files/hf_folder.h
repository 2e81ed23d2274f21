// A Hugging Face model folder: config.json, safetensors in one file or in shards, the tokenizer.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"

namespace espalier {

// Tensors get their GGUF names; the rows of q and k stay as they are (half-split rotary pairs).
absl::StatusOr<std::unique_ptr<ModelFile>> OpenHfFolder(const std::string& folder);

// What such a folder calls a tensor of a GGUF name; empty if it has none.
std::string HfTensorName(std::string_view name);

}  // namespace espalier
