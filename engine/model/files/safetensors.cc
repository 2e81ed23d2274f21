#include "engine/model/files/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstring>
#include <iterator>
#include <utility>

#include "engine/model/files/checksum.h"
#include "engine/model/files/file_error.h"
#include "engine/model/files/json_keys.h"

namespace espalier {
namespace {

static_assert(std::endian::native == std::endian::little, "the length is read as it lies");

constexpr std::pair<std::string_view, BlockType> kTypes[] = {
    {"F32", BlockType::kF32}, {"F16", BlockType::kF16}, {"BF16", BlockType::kBF16}};

// `facts`: {"dtype": "F32", "shape": [rows, cols], "data_offsets": [begin, end]}.
absl::StatusOr<StoredTensor> ReadTensor(const std::string& path, const std::string& name,
                                        const Json& facts, std::string_view data) {
  const std::string where = fmt::format("tensor {}", Quoted(name));
  StoredTensor tensor = {.name = name};

  const Json& type = At(facts, "dtype");
  const auto* known = std::ranges::find_if(kTypes, [&](auto& each) { return type == each.first; });
  if (known == std::end(kTypes)) {
    return Unsupported(path, where, fmt::format("type {}", Shown(type)), "F32, F16 and BF16");
  }
  tensor.type = known->second;

  const Json& shape = At(facts, "shape");
  const auto is_size = [](const Json& size) {
    return size.is_number_unsigned() && size.get<uint64_t>() >= 1 &&
           size.get<uint64_t>() <= INT_MAX;
  };
  if (!shape.is_array() || shape.empty() || shape.size() > 2 ||
      !std::ranges::all_of(shape, is_size)) {
    return Mismatch(path, where, "the shape of a vector or a matrix", Shown(shape));
  }
  tensor.cols = shape.back().get<int>();
  if (shape.size() == 2) tensor.rows = shape.front().get<int>();
  // Below 2^31 * 2^31 * 4, so no overflow.
  tensor.bytes = uint64_t(tensor.rows) * tensor.cols * BlockBytes(tensor.type);

  const Json& offsets = At(facts, "data_offsets");
  const auto is_offset = [&](const Json& offset) {
    return offset.is_number_unsigned() && offset.get<uint64_t>() <= data.size();
  };
  if (!offsets.is_array() || offsets.size() != 2 || !std::ranges::all_of(offsets, is_offset)) {
    return Mismatch(path, where, fmt::format("two offsets into {} bytes of data", data.size()),
                    Shown(offsets));
  }
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  if (end < begin || end - begin != tensor.bytes) {
    return Mismatch(path, where, fmt::format("{} bytes of {}", tensor.bytes, known->first),
                    fmt::format("offsets {} to {}", begin, end));
  }
  tensor.data = reinterpret_cast<const std::byte*>(data.data()) + begin;
  return tensor;
}

}  // namespace

absl::StatusOr<std::vector<StoredTensor>> ParseSafetensors(const std::string& path,
                                                           std::string_view bytes,
                                                           std::string* checksum) {
  uint64_t header_size = 0;
  if (bytes.size() < sizeof(header_size)) {
    return Mismatch(path, "offset 0", "the 8 bytes of a header length",
                    fmt::format("a file of {}", bytes.size()));
  }
  std::memcpy(&header_size, bytes.data(), sizeof(header_size));
  bytes.remove_prefix(sizeof(header_size));
  if (header_size > bytes.size()) {
    return Mismatch(path, "offset 0: header length",
                    fmt::format("at most the {} bytes left", bytes.size()),
                    fmt::format("{}", header_size));
  }
  const absl::StatusOr<Json> header = ParseJsonObject(path, bytes.substr(0, header_size));
  if (!header.ok()) return header.status();
  const std::string_view data = bytes.substr(header_size);

  std::vector<StoredTensor> tensors;
  for (const auto& [name, facts] : header->items()) {
    if (name == "__metadata__") {
      const Json& sum = At(facts, std::string(kChecksumKey));
      if (checksum != nullptr && sum.is_string()) *checksum = sum.get<std::string>();
      continue;
    }
    absl::StatusOr<StoredTensor> tensor = ReadTensor(path, name, facts, data);
    if (!tensor.ok()) return tensor.status();
    tensors.push_back(*std::move(tensor));
  }
  std::ranges::sort(tensors, {}, &StoredTensor::data);
  const auto* next = reinterpret_cast<const std::byte*>(data.data());
  for (const StoredTensor& tensor : tensors) {
    if (tensor.data != next) {
      return Mismatch(path, fmt::format("tensor {}", Quoted(tensor.name)),
                      "data right behind the tensor before",
                      fmt::format("{} bytes off", tensor.data - next));
    }
    next += tensor.bytes;
  }
  const auto* end = reinterpret_cast<const std::byte*>(data.data() + data.size());
  if (next != end) {
    return Mismatch(path, "end of the file", "the last tensor's end",
                    fmt::format("{} more bytes", end - next));
  }
  return tensors;
}

}  // namespace espalier
