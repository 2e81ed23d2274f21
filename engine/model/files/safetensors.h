// The safetensors container: a JSON table of tensors, checked against the bytes that follow it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"

namespace espalier {

// Tensors of F32, F16 and BF16, under the file's own names, pointing into `bytes`. Their data must
// lie end to end and fill the file. `path` is for messages. `checksum`, or null: gets that of
// checksum.h as the file has it, if it has one.
absl::StatusOr<std::vector<StoredTensor>> ParseSafetensors(const std::string& path,
                                                           std::string_view bytes,
                                                           std::string* checksum = nullptr);

}  // namespace espalier
