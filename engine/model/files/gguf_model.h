// What a GGUF's metadata means: the model's dimensions and its tokenizer.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/files/model_file.h"

namespace espalier {

absl::StatusOr<std::unique_ptr<ModelFile>> OpenGguf(const std::string& path, MappedFile file);

}  // namespace espalier
