// How this folder words a fault in a file: one line, whatever bytes the file holds.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace espalier {

// `text` in quotes, control characters escaped, cut after 80 bytes.
std::string Quoted(std::string_view text);

// InvalidArgument "<path>: <where>: expected <expected>, got <got>".
absl::Status Mismatch(std::string_view path, std::string_view where, std::string_view expected,
                      std::string_view got);

// Unimplemented "<path>: <where>: <what> is not supported, only <supported>".
absl::Status Unsupported(std::string_view path, std::string_view where, std::string_view what,
                         std::string_view supported);

}  // namespace espalier
