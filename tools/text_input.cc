#include "tools/text_input.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include <CLI/CLI.hpp>

#include "absl/status/status.h"

namespace espalier {

void AddTextInput(CLI::App& sub, TextInput* input) {
  CLI::Option* text = sub.add_option("TEXT", input->text, "The text itself");
  sub.add_option(
         "-f,--file,--text", input->file,
         "File to read the text from, verbatim; - for standard input, which is also read if "
         "it is not a terminal and no text is given")
      ->type_name("FILE")
      ->excludes(text);
}

absl::StatusOr<std::string> ReadText(const TextInput& input) {
  if (!input.text.empty()) return input.text;
  const bool from_stdin = input.file.empty() || input.file == "-";
  if (input.file.empty() && isatty(STDIN_FILENO) == 1) {
    return absl::InvalidArgumentError(
        "no text: give it as an argument, with --file FILE or on standard input");
  }
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> opened(nullptr, &std::fclose);
  if (!from_stdin) {
    opened.reset(std::fopen(input.file.c_str(), "rb"));
    if (!opened) {
      return absl::NotFoundError(
          fmt::format("cannot open {}: {}", input.file, std::strerror(errno)));
    }
  }
  std::FILE* file = from_stdin ? stdin : opened.get();
  std::string text;
  char buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof(buffer), file)) > 0;) text.append(buffer, n);
  if (std::ferror(file) != 0) {
    return absl::DataLossError(fmt::format(
        "cannot read {}: {}", from_stdin ? "standard input" : input.file, std::strerror(errno)));
  }
  return text;
}

}  // namespace espalier
