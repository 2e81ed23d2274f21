#include "engine/model/files/gguf_writer.h"

#include <fmt/format.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <fstream>

namespace espalier {
namespace {

constexpr uint64_t kAlignment = 32;  // GGUF's default
static_assert(std::endian::native == std::endian::little);

uint64_t Padding(uint64_t bytes) { return (kAlignment - bytes % kAlignment) % kAlignment; }

template <typename Value>
void Put(Value value, std::string* to) {
  to->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void PutText(std::string_view text, std::string* to) {
  Put<uint64_t>(text.size(), to);
  *to += text;
}

// The format's number of a type that files of ours have.
uint32_t NumberOf(BlockType type) {
  switch (type) {
    case BlockType::kF32:
      return 0;
    case BlockType::kQ4_1:
      return 3;
    default:
      std::abort();
  }
}

}  // namespace

void GgufWriter::Add(std::string_view key, std::string_view value) {
  PutText(key, &metadata_);
  Put(GgufType::kString, &metadata_);
  PutText(value, &metadata_);
  ++keys_;
}

void GgufWriter::Add(std::string_view key, std::span<const int32_t> values) {
  PutText(key, &metadata_);
  Put(GgufType::kArray, &metadata_);
  Put(GgufType::kInt32, &metadata_);
  Put<uint64_t>(values.size(), &metadata_);
  for (const int32_t value : values) Put(value, &metadata_);
  ++keys_;
}

void GgufWriter::Add(std::string_view key, int64_t value) {
  PutText(key, &metadata_);
  Put(GgufType::kInt64, &metadata_);
  Put(value, &metadata_);
  ++keys_;
}

void GgufWriter::AddTensor(std::string_view name, BlockType type, int rows, int cols,
                           std::span<const std::byte> data) {
  PutText(name, &table_);
  Put<uint32_t>(2, &table_);
  Put<uint64_t>(cols, &table_);
  Put<uint64_t>(rows, &table_);
  Put(NumberOf(type), &table_);
  Put(end_, &table_);
  data_.push_back(data);
  end_ += data.size() + Padding(data.size());
}

absl::Status GgufWriter::Write(const std::string& path) const {
  std::string head = "GGUF";
  Put<uint32_t>(3, &head);
  Put<uint64_t>(data_.size(), &head);
  Put(keys_, &head);
  head += metadata_ + table_;
  const std::string temporary = path + ".new";
  std::ofstream file(temporary, std::ios::binary);
  const auto write = [&file](const void* bytes, size_t size) {
    static constexpr char kZeros[kAlignment] = {};
    file.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(size));
    file.write(kZeros, static_cast<std::streamsize>(Padding(size)));
  };
  write(head.data(), head.size());
  for (const std::span<const std::byte> data : data_) write(data.data(), data.size());
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    std::remove(temporary.c_str());
    return absl::UnavailableError(fmt::format("{}: cannot be written", path));
  }
  return absl::OkStatus();
}

}  // namespace espalier
