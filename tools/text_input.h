// A subcommand's text: given as an argument, from a file or from standard input.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace CLI {
class App;
}

namespace espalier {

struct TextInput {
  std::string text;
  std::string file;
};

void AddTextInput(CLI::App& sub, TextInput* input);

// Verbatim. Standard input if the file is "-", or if neither is given and it is no terminal.
absl::StatusOr<std::string> ReadText(const TextInput& input);

}  // namespace espalier
