#include "engine/model/files/model_rewriter.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/model/files/checksum.h"
#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/hf_folder.h"
#include "engine/model/files/mapped_file.h"

namespace espalier {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kGgufAlignment = 32;
constexpr std::string_view kWeightsName = "model.safetensors";
constexpr std::string_view kFileTypeKey = "general.file_type";

// llama.cpp's numbers of files that are mostly of one type; for who asks what a file is.
uint32_t FileTypeOf(BlockType type) {
  return type == BlockType::kF32 ? 0 : type == BlockType::kF16 ? 1 : 32;
}

struct Place {
  const StoredTensor* tensor = nullptr;
  bool replaced = false;
  bool written = false;
  uint64_t offset = 0;  // in the file
  uint64_t bytes = 0;
  uint64_t sum = 0;  // of what was written
};

// A file's beginning, but for the digits of its checksum.
struct Header {
  std::string bytes;
  size_t checksum_at = 0;
};

// Config and tokenizer, which are small, but no weights.
absl::Status CopyBesides(const fs::path& from, const fs::path& to) {
  std::error_code error;
  for (fs::directory_iterator it(from, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    const std::string kind = it->path().extension().string();
    if (!it->is_regular_file(error) || name.starts_with('.') || name.ends_with(".index.json")) {
      continue;
    }
    if (kind != ".json" && kind != ".jinja" && kind != ".txt" && kind != ".model") continue;
    fs::copy_file(it->path(), to / name, fs::copy_options::overwrite_existing, error);
  }
  if (!error) return absl::OkStatus();
  return absl::UnavailableError(fmt::format("{}: {}", to.string(), error.message()));
}

// Whether an open file is what a killed process left of one that it wrote: without its header.
bool IsUnfinished(int file, uint64_t size) {
  char first[16] = {};
  const size_t count = std::min<uint64_t>(size, sizeof(first));
  return pread(file, first, count, 0) == static_cast<ssize_t>(count) &&
         std::ranges::all_of(first, [](char each) { return each == 0; });
}

// A file of a header and tensors at known places.
class FileRewriter final : public ModelRewriter {
 public:
  // `besides`: the folder that the file's own gets config and tokenizer of; empty: it is in none.
  FileRewriter(std::string path, BlockType type, fs::path besides)
      : path_(std::move(path)), type_(type), besides_(std::move(besides)) {}

  ~FileRewriter() override {
    if (file_ >= 0) {
      close(file_);
      std::remove(aside().c_str());
    }
    std::error_code none;
    if (!made_.empty() && !finished_) fs::remove(made_, none);  // as long as it is empty
  }

  absl::Status Begin(Header header, std::map<std::string, Place> places) {
    header_ = std::move(header);
    places_ = std::move(places);
    if (!besides_.empty()) {
      std::error_code error;
      if (fs::create_directories(folder(), error)) made_ = folder();
      if (error) {
        return absl::UnavailableError(fmt::format("{}: {}", folder().string(), error.message()));
      }
    }
    const int file =
        open(aside().c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (file < 0 && (errno == ELOOP || errno == ENXIO)) return Foreign();
    if (file < 0) return SystemError("open");
    // Of two that write the same model one does; what a killed one left is written over.
    struct stat opened, there;
    if (flock(file, LOCK_EX | LOCK_NB) != 0 || fstat(file, &opened) != 0 ||
        stat(aside().c_str(), &there) != 0 || opened.st_ino != there.st_ino) {
      close(file);
      return absl::FailedPreconditionError(
          fmt::format("{}: is being written by another process", path_));
    }
    if (!S_ISREG(opened.st_mode) || !IsUnfinished(file, opened.st_size)) {
      close(file);
      return Foreign();
    }
    file_ = file;  // ours, to be removed
    if (ftruncate(file_, 0) != 0) return SystemError("truncate");
    for (auto& [name, place] : places_) {
      if (place.replaced) continue;
      const absl::Status status = WriteAt(place.offset, place.tensor->data, place.tensor->bytes);
      if (!status.ok()) return status;
      Checksum sum;
      sum.Add(place.tensor->data, place.tensor->bytes);
      place.sum = sum.value();
    }
    return absl::OkStatus();
  }

  absl::Status Write(const StoredTensor& tensor, std::span<const float> values) override {
    const auto found = places_.find(tensor.name);
    if (found == places_.end() || !found->second.replaced || found->second.written ||
        values.size() != static_cast<size_t>(tensor.rows) * tensor.cols) {
      return absl::InternalError(
          fmt::format("{}: tensor {} is not to be written, or was", path_, Quoted(tensor.name)));
    }
    Place& place = found->second;
    constexpr size_t kChunk = 1 << 18;  // values: of a cache's size
    rounded_.resize(std::min(values.size(), kChunk) * BlockBytes(type_));
    Checksum sum;
    for (size_t done = 0; done < values.size(); done += kChunk) {
      const size_t count = std::min(kChunk, values.size() - done);
      RoundTo(type_, values.data() + done, static_cast<int64_t>(count), rounded_.data());
      const absl::Status status = WriteAt(place.offset + done * BlockBytes(type_), rounded_.data(),
                                          count * BlockBytes(type_));
      if (!status.ok()) return status;
      sum.Add(rounded_.data(), count * BlockBytes(type_));
    }
    place.sum = sum.value();
    place.written = true;
    return absl::OkStatus();
  }

  absl::Status Finish() override {
    uint64_t end = 0;
    for (const auto& [name, place] : places_) {
      if (place.replaced && !place.written) {
        return absl::FailedPreconditionError(
            fmt::format("{}: tensor {} was not written", path_, Quoted(name)));
      }
      end = std::max(end, place.offset + place.bytes);
    }
    if (ftruncate(file_, static_cast<off_t>(end)) != 0) return SystemError("truncate");
    std::vector<TensorSum> sums;
    for (const auto& [name, place] : places_) {
      sums.push_back({name, place.replaced ? type_ : place.tensor->type, place.tensor->rows,
                      place.tensor->cols, place.sum});
    }
    header_.bytes.replace(header_.checksum_at, kChecksumDigits, ModelChecksum(sums));
    if (absl::Status status = WriteAt(0, header_.bytes.data(), header_.bytes.size());
        !status.ok()) {
      return status;
    }
    // The lock ends with the last descriptor, when the name is no longer that of what is written.
    const int file = dup(file_);
    const bool closed = file >= 0 && close(file) == 0;
    if (closed && !besides_.empty()) {
      if (absl::Status status = CopyBesides(besides_, folder()); !status.ok()) return status;
    }
    if (!closed || std::rename(aside().c_str(), path_.c_str()) != 0) {
      return SystemError(closed ? "rename" : "close");
    }
    close(std::exchange(file_, -1));
    finished_ = true;
    return absl::OkStatus();
  }

 private:
  std::string aside() const { return path_ + ".new"; }
  fs::path folder() const { return fs::absolute(path_).parent_path(); }

  absl::Status Foreign() const {
    return absl::FailedPreconditionError(fmt::format(
        "{}: is nothing that an interrupted run left; it would be written over: move it", aside()));
  }

  absl::Status SystemError(std::string_view call) const {
    return absl::UnavailableError(
        fmt::format("{}: {}: {}", path_, call, std::generic_category().message(errno)));
  }

  absl::Status WriteAt(uint64_t offset, const void* data, size_t size) {
    const auto* from = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t done = pwrite(file_, from, size, static_cast<off_t>(offset));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) return SystemError("write");
      from += done;
      offset += done;
      size -= done;
    }
    return absl::OkStatus();
  }

  std::string path_;
  BlockType type_;
  fs::path besides_, made_;
  bool finished_ = false;
  int file_ = -1;
  Header header_;
  std::map<std::string, Place> places_;
  std::vector<std::byte> rounded_;
};

// In the order in which the file has them.
std::vector<Place> PlacesOf(const ModelFile& file, BlockType type,
                            const std::function<bool(const StoredTensor&)>& replaced) {
  std::vector<Place> places;
  for (const StoredTensor& tensor : file.tensors()) {
    Place place{.tensor = &tensor, .replaced = replaced(tensor)};
    place.bytes = place.replaced
                      ? static_cast<uint64_t>(tensor.rows) * tensor.cols * BlockBytes(type)
                      : tensor.bytes;
    places.push_back(place);
  }
  std::ranges::sort(places, {}, [](const Place& place) { return place.tensor->data; });
  return places;
}

template <typename Value>
void Put(Value value, std::string* to) {
  to->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

absl::StatusOr<Header> GgufHeader(const ModelFile& file, BlockType type,
                                  std::vector<Place>* places) {
  const absl::StatusOr<MappedFile> mapped = MappedFile::Open(file.path());
  if (!mapped.ok()) return mapped.status();
  const std::string_view bytes = mapped->bytes();
  const absl::StatusOr<Gguf> gguf = ParseGguf(file.path(), bytes);
  if (!gguf.ok()) return gguf.status();
  GgufKeys keys(file.path(), *gguf);
  const auto alignment = static_cast<uint64_t>(
      keys.Integer("general.alignment", 1, INT32_MAX, static_cast<int64_t>(kGgufAlignment)));
  constexpr size_t kKeyCount = 4 + 4 + 8, kFixed = kKeyCount + 8;  // magic, version, counts
  const char* end = bytes.data() + kFixed;
  for (const auto& [key, value] : gguf->metadata) {
    end = std::max(end, value.bytes.data() + value.bytes.size());
  }
  std::string header(bytes.data(), end);
  const auto found = gguf->metadata.find(kFileTypeKey);
  if (found != gguf->metadata.end() && found->second.type == GgufType::kUint32) {
    const uint32_t number = FileTypeOf(type);
    std::memcpy(header.data() + (found->second.bytes.data() - bytes.data()), &number,
                sizeof(number));
  }
  size_t checksum_at = 0;
  if (const std::string_view old = keys.String(kChecksumKey, ""); old.size() == kChecksumDigits) {
    checksum_at = old.data() - bytes.data();
  } else if (keys.Has(kChecksumKey)) {
    return Mismatch(file.path(), fmt::format("key {}", Quoted(kChecksumKey)),
                    fmt::format("{} digits", kChecksumDigits), Quoted(old));
  } else {
    const uint64_t count = gguf->metadata.size() + 1;
    std::memcpy(header.data() + kKeyCount, &count, sizeof(count));
    Put<uint64_t>(kChecksumKey.size(), &header);
    header += kChecksumKey;
    Put(GgufType::kString, &header);
    Put<uint64_t>(kChecksumDigits, &header);
    checksum_at = header.size();
    header.append(kChecksumDigits, '0');
  }
  uint64_t data = 0;
  for (Place& place : *places) {
    const StoredTensor& tensor = *place.tensor;
    Put<uint64_t>(tensor.name.size(), &header);
    header += tensor.name;
    Put<uint32_t>(tensor.rows == 1 ? 1 : 2, &header);
    Put<uint64_t>(tensor.cols, &header);
    if (tensor.rows != 1) Put<uint64_t>(tensor.rows, &header);
    Put(GgufNumberOf(place.replaced ? type : tensor.type), &header);
    Put(data, &header);
    place.offset = data;
    data += (place.bytes + alignment - 1) / alignment * alignment;
  }
  header.resize((header.size() + alignment - 1) / alignment * alignment);
  for (Place& place : *places) place.offset += header.size();
  return Header{std::move(header), checksum_at};
}

std::string_view SafetensorsName(BlockType type) {
  return type == BlockType::kF32 ? "F32" : type == BlockType::kF16 ? "F16" : "BF16";
}

Header SafetensorsHeader(BlockType type, std::vector<Place>* places) {
  const std::string digits(kChecksumDigits, '0');
  nlohmann::ordered_json table;
  table["__metadata__"] = {{"format", "pt"}, {kChecksumKey, digits}};
  uint64_t data = 0;
  for (Place& place : *places) {
    const StoredTensor& tensor = *place.tensor;
    nlohmann::ordered_json shape = nlohmann::ordered_json::array();
    if (tensor.rows != 1) shape.push_back(tensor.rows);
    shape.push_back(tensor.cols);
    place.offset = data;
    data += place.bytes;
    table[HfTensorName(tensor.name)] = {
        {"dtype", SafetensorsName(place.replaced ? type : tensor.type)},
        {"shape", shape},
        {"data_offsets", {place.offset, data}}};
  }
  std::string text = table.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string header;
  Put<uint64_t>(text.size(), &header);
  header += text;
  for (Place& place : *places) place.offset += header.size();
  const size_t checksum_at = header.find(digits, header.find(kChecksumKey));
  return Header{std::move(header), checksum_at};
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRewriter>> ModelRewriter::Create(
    const ModelFile& file, const std::string& out, BlockType type,
    const std::function<bool(const StoredTensor&)>& replaced) {
  std::error_code error;
  const bool folder = fs::is_directory(file.path(), error);
  fs::path weights(out);
  if (folder != (weights.extension() != ".gguf")) {
    return Mismatch(out, "format",
                    folder ? "a folder, as the model is" : "a .gguf, as the model is",
                    folder ? "a .gguf" : "another name");
  }
  if (folder && weights.extension() == ".safetensors" && weights.filename() != kWeightsName) {
    return Mismatch(out, "name", fmt::format("a folder, or FOLDER/{}", kWeightsName),
                    Quoted(weights.filename().string()));
  }
  if (folder && weights.extension() != ".safetensors") weights /= kWeightsName;
  const fs::path own = folder ? fs::path(file.path()) / kWeightsName : fs::path(file.path());
  if (fs::equivalent(folder ? own.parent_path() : own, folder ? weights.parent_path() : weights,
                     error)) {
    return Mismatch(out, "place", "another than the model's own", "the same");
  }
  if (folder && fs::exists(weights.parent_path() / "model.safetensors.index.json", error)) {
    return Mismatch(out, "place", "no model in shards", "model.safetensors.index.json");
  }
  std::vector<Place> places = PlacesOf(file, type, replaced);
  absl::StatusOr<Header> header;
  if (folder) {
    header = SafetensorsHeader(type, &places);
  } else {
    header = GgufHeader(file, type, &places);
  }
  if (!header.ok()) return header.status();
  std::map<std::string, Place> named;
  for (const Place& place : places) named.emplace(place.tensor->name, place);
  auto rewriter = std::make_unique<FileRewriter>(weights.string(), type,
                                                 folder ? fs::path(file.path()) : fs::path());
  if (absl::Status status = rewriter->Begin(*std::move(header), std::move(named)); !status.ok())
    return status;
  return rewriter;
}

}  // namespace espalier
