// A regular file's bytes, mapped read-only for as long as the object lives.
#pragma once

#include <cstdint>
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

  // Whether the file is as it was opened, by its size and the time of its last change; whatever
  // lies at its path by now. What is read of one that was made shorter would end the process.
  bool Unchanged() const;

  // Counts what was read as this process's no more, until it is read again. The system keeps what
  // it has of the file while it can.
  void LetGo() const;

 private:
  MappedFile(int file, int64_t changed_ns, std::string_view bytes)
      : file_(file), changed_ns_(changed_ns), bytes_(bytes) {}

  int file_ = -1;  // descriptor; -1: none
  int64_t changed_ns_ = 0;
  std::string_view bytes_;
};

}  // namespace espalier
