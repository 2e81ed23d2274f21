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

int64_t Changed(const struct stat& facts) {
  return int64_t{facts.st_mtim.tv_sec} * 1'000'000'000 + facts.st_mtim.tv_nsec;
}

}  // namespace

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  // Non-blocking, or a FIFO would keep us waiting for its writer.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return SystemError(path, "open");
  MappedFile file(descriptor, 0, {});  // closes it
  struct stat facts;
  if (fstat(descriptor, &facts) != 0) return SystemError(path, "stat");
  if (!S_ISREG(facts.st_mode)) {
    return absl::InvalidArgumentError(fmt::format("{}: expected a regular file", path));
  }
  file.changed_ns_ = Changed(facts);
  if (facts.st_size > 0) {
    const auto size = static_cast<size_t>(facts.st_size);
    void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (address == MAP_FAILED) return SystemError(path, "mmap");
    file.bytes_ = std::string_view(static_cast<const char*>(address), size);
  }
  return file;
}

bool MappedFile::Unchanged() const {
  struct stat facts;
  return fstat(file_, &facts) == 0 && static_cast<size_t>(facts.st_size) == bytes_.size() &&
         Changed(facts) == changed_ns_;
}

void MappedFile::LetGo() const {
  if (!bytes_.empty()) madvise(const_cast<char*>(bytes_.data()), bytes_.size(), MADV_DONTNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : file_(std::exchange(other.file_, -1)),
      changed_ns_(other.changed_ns_),
      bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(file_, other.file_);
  std::swap(changed_ns_, other.changed_ns_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<char*>(bytes_.data()), bytes_.size());
  if (file_ >= 0) close(file_);
}

}  // namespace espalier
