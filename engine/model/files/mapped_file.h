// A regular file's bytes, mapped read-only for as long as the object lives.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace espalier {

class MappedFile {
 public:
  // NotFound if nothing is there; InvalidArgument, with the system's own words, if it is not a
  // regular file or cannot be read. An empty file has empty bytes.
  static absl::StatusOr<MappedFile> Open(const std::string& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::string_view bytes() const { return bytes_; }

 private:
  explicit MappedFile(std::string_view bytes) : bytes_(bytes) {}

  std::string_view bytes_;
};

}  // namespace espalier
