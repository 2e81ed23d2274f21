#include "tools/corpus.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "tools/local_model.h"

namespace espalier {
namespace {

namespace fs = std::filesystem;

// Of one file in a folder: many files are worth more than a long one.
constexpr size_t kFileBytes = 16 << 10;
// Of a kind: enough for windows spread over it.
constexpr size_t kKindBytes = 8 << 20;
constexpr size_t kKindTokens = 1 << 20;

// Its first bytes; none if it cannot be read.
std::string ReadSome(const fs::path& path, size_t most) {
  std::ifstream file(path, std::ios::binary);
  std::string text(most, '\0');
  file.read(text.data(), static_cast<std::streamsize>(most));
  text.resize(file.gcount());
  return text;
}

// Cut after its last line; empty if it holds bytes that no text has.
std::string AsText(std::string text, bool whole) {
  if (text.find('\0') != std::string::npos) return "";
  if (!whole) text.resize(text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n') + 1);
  return text;
}

absl::StatusOr<std::vector<int32_t>> FileTokens(const fs::path& path, size_t most,
                                                const Tokenizer& tokenizer) {
  const std::string read = ReadSome(path, most);
  return EncodeText(tokenizer, AsText(read, read.size() < most), /*special=*/false);
}

// Of all files that are text.
std::vector<int32_t> FolderTokens(const fs::path& path, const Tokenizer& tokenizer, size_t most,
                                  std::error_code* error) {
  std::vector<fs::path> files;
  for (fs::recursive_directory_iterator it(path, *error), end; !*error && it != end;
       it.increment(*error)) {
    if (it->is_regular_file(*error)) files.push_back(it->path());
  }
  std::ranges::sort(files);
  std::vector<int32_t> tokens;
  for (const fs::path& file : files) {
    const absl::StatusOr<std::vector<int32_t>> more = FileTokens(file, kFileBytes, tokenizer);
    if (more.ok()) tokens.insert(tokens.end(), more->begin(), more->end());
    if (tokens.size() >= most) break;
  }
  return tokens;
}

}  // namespace

absl::StatusOr<std::vector<TextKind>> ReadKinds(const std::vector<std::string>& paths,
                                                const Tokenizer& tokenizer, int window, int most) {
  std::vector<TextKind> kinds;
  for (const std::string& name : paths) {
    const fs::path path(name);
    std::error_code error;
    absl::StatusOr<std::vector<int32_t>> tokens = std::vector<int32_t>();
    if (fs::is_directory(path, error)) {
      tokens = FolderTokens(path, tokenizer, kKindTokens, &error);
    } else if (fs::is_regular_file(path, error)) {
      tokens = FileTokens(path, kKindBytes, tokenizer);
      if (const uintmax_t bytes = fs::file_size(path, error); !error && bytes > kKindBytes) {
        fmt::print(stderr, "warning: {}: of {:.1f} MiB the first {} are read\n", name,
                   static_cast<double>(bytes) / (1 << 20), kKindBytes >> 20);
      }
    }
    if (error) return absl::NotFoundError(fmt::format("{}: {}", name, error.message()));
    if (!tokens.ok()) {
      return absl::Status(tokens.status().code(),
                          fmt::format("{}: {}", name, tokens.status().ToString()));
    }
    const int64_t whole = static_cast<int64_t>(tokens->size()) / window;
    if (whole == 0) {
      return absl::InvalidArgumentError(
          fmt::format("{}: {} tokens, less than a window of {}", name, tokens->size(), window));
    }
    TextKind kind{.name = (path.has_filename() ? path : path.parent_path()).stem().string()};
    const int64_t count = std::min<int64_t>(whole, most);
    for (int64_t i = 0; i < count; ++i) {
      const auto begin = tokens->begin() + i * whole / count * window;
      kind.windows.emplace_back(begin, begin + window);
    }
    kinds.push_back(std::move(kind));
  }
  return kinds;
}

}  // namespace espalier
