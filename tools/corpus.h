// Calibration and evaluation text: files and folders, a kind of text each, as windows of tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/text/tokenizer.h"

namespace espalier {

struct TextKind {
  std::string name;                           // of the file or folder
  std::vector<std::vector<int32_t>> windows;  // all of the same length
};

// Each path is a kind: a file, of which 8 MiB count (a warning tells where it has more), or a
// folder, of which all files that are text count, in the order of their names and those below, with
// 16 KiB of each at most. Windows of `window` tokens lie end to end; at most `most` of them, spread
// over the whole kind. Errors name the path; a kind without a whole window is InvalidArgument.
absl::StatusOr<std::vector<TextKind>> ReadKinds(const std::vector<std::string>& paths,
                                                const Tokenizer& tokenizer, int window, int most);

}  // namespace espalier
