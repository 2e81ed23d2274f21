// What must hold for whatever a fuzzer made of its input; what does not hold ends the program.
#pragma once

#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"

namespace espalier {

// Aborts, naming `what`, unless it holds.
void Require(bool holds, std::string_view what);

// A fault is one line of bounded length, whatever bytes the input holds.
void RequireOneLine(const absl::Status& status);

// Every row of the tensor can be read.
void ReadRows(const StoredTensor& tensor);

// A model either is refused in one line, or can be used to its end: tensors, rotary frequencies,
// tokenizer, chat template.
void RequireRefusedOrUsable(const absl::StatusOr<std::unique_ptr<ModelFile>>& file);

}  // namespace espalier
