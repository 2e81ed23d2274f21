#include "engine/model/files/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace espalier {
namespace {

absl::Status SystemError(const std::string& path, std::string_view call) {
  const int error = errno;
  const std::string message =
      fmt::format("{}: {}: {}", path, call, std::generic_category().message(error));
  return error == ENOENT ? absl::NotFoundError(message) : absl::InvalidArgumentError(message);
}

}  // namespace

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  // Non-blocking, or a FIFO would keep us waiting for its writer.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return SystemError(path, "open");
  struct stat facts;
  absl::StatusOr<MappedFile> result = MappedFile("");
  if (fstat(file, &facts) != 0) {
    result = SystemError(path, "stat");
  } else if (!S_ISREG(facts.st_mode)) {
    result = absl::InvalidArgumentError(fmt::format("{}: expected a regular file", path));
  } else if (facts.st_size > 0) {
    const auto size = static_cast<size_t>(facts.st_size);
    void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    if (address == MAP_FAILED) {
      result = SystemError(path, "mmap");
    } else {
      result = MappedFile(std::string_view(static_cast<const char*>(address), size));
    }
  }
  close(file);  // the mapping stays
  return result;
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<char*>(bytes_.data()), bytes_.size());
}

}  // namespace espalier
