#include "engine/model/files/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <cstring>
#include <utility>

#include "engine/model/files/file_error.h"

namespace espalier {
namespace {

static_assert(std::endian::native == std::endian::little, "values are read as they lie");

constexpr int kMaxArrayDepth = 4;  // nothing nests arrays today
constexpr uint64_t kMaxAlignment = 1 << 16;
constexpr uint64_t kDefaultAlignment = 32;

// Smallest sizes on disk, to bound counts by what the file can hold.
constexpr uint64_t kMinKeyBytes = 8 + 4 + 1;         // name length, type, value
constexpr uint64_t kMinTensorBytes = 8 + 4 + 4 + 8;  // name length, dimensions, type, offset
constexpr uint64_t kMinStringBytes = 8;              // length
constexpr uint64_t kMinNestedArrayBytes = 4 + 8;     // type, count

struct TypeFacts {
  std::string_view name;
  uint64_t bytes;  // 0: of no fixed size
};

// Indexed by GgufType.
constexpr std::array<TypeFacts, 13> kTypes = {{{"uint8", 1},
                                               {"int8", 1},
                                               {"uint16", 2},
                                               {"int16", 2},
                                               {"uint32", 4},
                                               {"int32", 4},
                                               {"float32", 4},
                                               {"bool", 1},
                                               {"string", 0},
                                               {"array", 0},
                                               {"uint64", 8},
                                               {"int64", 8},
                                               {"float64", 8}}};

const TypeFacts& FactsOf(GgufType type) { return kTypes[static_cast<size_t>(type)]; }

// ggml's number of each format, those included that are only named in messages.
struct TensorType {
  uint32_t id;
  std::string_view name;
  std::optional<BlockType> type;
};
constexpr TensorType kTensorTypes[] = {
    {0, "F32", BlockType::kF32},
    {1, "F16", BlockType::kF16},
    {2, "Q4_0", BlockType::kQ4_0},
    {3, "Q4_1", BlockType::kQ4_1},
    {6, "Q5_0", BlockType::kQ5_0},
    {7, "Q5_1", BlockType::kQ5_1},
    {8, "Q8_0", BlockType::kQ8_0},
    {10, "Q2_K", {}},
    {11, "Q3_K", {}},
    {12, "Q4_K", BlockType::kQ4_K},
    {13, "Q5_K", BlockType::kQ5_K},
    {14, "Q6_K", BlockType::kQ6_K},
    {30, "BF16", BlockType::kBF16},
};

// Walks the file from its start; after the first fault every read gives zeros.
class Cursor {
 public:
  Cursor(const std::string& path, std::string_view bytes) : path_(path), bytes_(bytes) {}

  const absl::Status& status() const { return status_; }
  bool ok() const { return status_.ok(); }
  uint64_t offset() const { return at_; }

  void Fail(absl::Status status) { status_.Update(status); }

  // The next `count` bytes.
  std::string_view Take(uint64_t count, std::string_view what) {
    if (!ok()) return {};
    if (count > Left()) {
      Fail(Mismatch(path_, fmt::format("offset {}: {}", at_, what), fmt::format("{} bytes", count),
                    fmt::format("{} until the end of the file", Left())));
      return {};
    }
    const std::string_view taken = bytes_.substr(at_, count);
    at_ += count;
    return taken;
  }

  template <typename T>
  T Number(std::string_view what) {
    T value = 0;
    const std::string_view taken = Take(sizeof(T), what);
    if (!taken.empty()) std::memcpy(&value, taken.data(), sizeof(T));
    return value;
  }

  std::string_view String(std::string_view what) { return Take(Number<uint64_t>(what), what); }

  // A number of things that take at least `min_bytes` each.
  uint64_t Count(uint64_t min_bytes, std::string_view what) {
    const uint64_t start = at_;
    const auto count = Number<uint64_t>(what);
    if (!ok() || count <= Left() / min_bytes) return ok() ? count : 0;
    Fail(Mismatch(path_, fmt::format("offset {}: {}", start, what),
                  fmt::format("at most {} in what is left of the file", Left() / min_bytes),
                  fmt::format("{}", count)));
    return 0;
  }

  GgufType Type(std::string_view what) {
    const uint64_t start = at_;
    const auto id = Number<uint32_t>(what);
    if (id < kTypes.size()) return static_cast<GgufType>(id);
    Fail(Mismatch(path_, fmt::format("offset {}: {}", start, what), "a type of 0..12",
                  fmt::format("{}", id)));
    return GgufType::kUint8;
  }

  // A value of `type`; `depth` arrays are around it.
  GgufValue Value(GgufType type, int depth, std::string_view what) {
    GgufValue value = {.type = type};
    if (type == GgufType::kString) {
      value.bytes = String(what);
    } else if (type == GgufType::kArray) {
      if (depth == kMaxArrayDepth) {
        Fail(Mismatch(path_, fmt::format("offset {}: {}", at_, what),
                      fmt::format("at most {} nested arrays", kMaxArrayDepth), "more"));
        return value;
      }
      value.element = Type(what);
      const uint64_t size = FactsOf(value.element).bytes;
      value.count = Count(size > 0                             ? size
                          : value.element == GgufType::kString ? kMinStringBytes
                                                               : kMinNestedArrayBytes,
                          what);
      const uint64_t start = at_;
      if (size > 0) {
        Take(value.count * size, what);
      } else {
        for (uint64_t i = 0; i < value.count && ok(); ++i) Value(value.element, depth + 1, what);
      }
      value.bytes = bytes_.substr(start, at_ - start);
    } else {
      value.bytes = Take(FactsOf(type).bytes, what);
    }
    return value;
  }

 private:
  uint64_t Left() const { return bytes_.size() - at_; }

  const std::string& path_;
  std::string_view bytes_;
  uint64_t at_ = 0;
  absl::Status status_;
};

int64_t IntegerAt(GgufType type, const char* src, bool* is_integer) {
  const auto load = [src]<typename T>(T value) {
    std::memcpy(&value, src, sizeof(T));
    // Beyond int64 is beyond every limit there is.
    if constexpr (sizeof(T) == 8) return static_cast<int64_t>(std::min<T>(value, INT64_MAX));
    return static_cast<int64_t>(value);
  };
  *is_integer = true;
  switch (type) {
    case GgufType::kUint8:
      return load(uint8_t{});
    case GgufType::kInt8:
      return load(int8_t{});
    case GgufType::kUint16:
      return load(uint16_t{});
    case GgufType::kInt16:
      return load(int16_t{});
    case GgufType::kUint32:
      return load(uint32_t{});
    case GgufType::kInt32:
      return load(int32_t{});
    case GgufType::kUint64:
      return load(uint64_t{});
    case GgufType::kInt64:
      return load(int64_t{});
    default:
      *is_integer = false;
      return 0;
  }
}

struct TensorEntry {
  StoredTensor tensor;
  uint64_t offset = 0;  // from the start of the tensor data
};

// One row of the tensor table; all but where its data lies.
TensorEntry ReadTensorEntry(const std::string& path, Cursor& cursor) {
  TensorEntry entry;
  StoredTensor& tensor = entry.tensor;
  tensor.name = std::string(cursor.String("name of a tensor"));
  const std::string where = fmt::format("tensor {}", Quoted(tensor.name));
  const auto mismatch = [&](std::string_view expected, std::string_view got) {
    cursor.Fail(Mismatch(path, where, expected, got));
  };

  const auto rank = cursor.Number<uint32_t>(where);
  if (cursor.ok() && (rank < 1 || rank > 4)) mismatch("1 to 4 dimensions", fmt::format("{}", rank));
  std::array<uint64_t, 4> dims = {1, 1, 1, 1};  // fastest first
  for (uint32_t i = 0; i < rank && cursor.ok(); ++i) {
    dims[i] = cursor.Number<uint64_t>(where);
    if (!cursor.ok()) break;
    if (dims[i] < 1 || dims[i] > INT_MAX) {
      mismatch(fmt::format("dimension {} in 1..{}", i, INT_MAX), fmt::format("{}", dims[i]));
    } else if (i >= 2 && dims[i] != 1) {
      mismatch("a vector or a matrix", fmt::format("dimension {} of {}", i, dims[i]));
    }
  }
  const auto id = cursor.Number<uint32_t>(where);
  entry.offset = cursor.Number<uint64_t>(where);
  if (!cursor.ok()) return entry;

  const auto* known = std::ranges::find(kTensorTypes, id, &TensorType::id);
  if (known == std::end(kTensorTypes) || !known->type) {
    const std::string name =
        known == std::end(kTensorTypes) ? "" : fmt::format(" ({})", known->name);
    cursor.Fail(Unsupported(path, where, fmt::format("type {}{}", id, name),
                            "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K"));
    return entry;
  }
  tensor.type = *known->type;
  tensor.cols = static_cast<int>(dims[0]);
  tensor.rows = static_cast<int>(dims[1]);
  if (tensor.cols % BlockValues(tensor.type) != 0) {
    mismatch(fmt::format("rows of a multiple of {} values for {}", BlockValues(tensor.type),
                         known->name),
             fmt::format("{}", tensor.cols));
  }
  // Below 2^31 * 2^31 * 4, so no overflow.
  tensor.bytes = dims[1] * (dims[0] / BlockValues(tensor.type)) * BlockBytes(tensor.type);
  return entry;
}

}  // namespace

absl::StatusOr<Gguf> ParseGguf(const std::string& path, std::string_view bytes) {
  Cursor cursor(path, bytes);
  if (!bytes.starts_with("GGUF")) {
    return Mismatch(path, "offset 0", "\"GGUF\"", Quoted(bytes.substr(0, 4)));
  }
  cursor.Take(4, "magic");
  const auto version = cursor.Number<uint32_t>("version");
  if (cursor.ok() && version != 2 && version != 3) {
    return Mismatch(path, "offset 4: version", "2 or 3", fmt::format("{}", version));
  }
  const uint64_t tensor_count = cursor.Count(kMinTensorBytes, "number of tensors");
  const uint64_t key_count = cursor.Count(kMinKeyBytes, "number of metadata keys");

  Gguf gguf;
  for (uint64_t i = 0; i < key_count && cursor.ok(); ++i) {
    const std::string_view key = cursor.String("name of a metadata key");
    const std::string where = fmt::format("key {}", Quoted(key));
    const GgufType type = cursor.Type(where);
    const GgufValue value = cursor.Value(type, 0, where);
    if (cursor.ok() && !gguf.metadata.emplace(key, value).second) {
      return Mismatch(path, where, "it once", "it twice");
    }
  }
  std::vector<TensorEntry> entries;
  for (uint64_t i = 0; i < tensor_count && cursor.ok(); ++i) {
    entries.push_back(ReadTensorEntry(path, cursor));
  }
  if (!cursor.ok()) return cursor.status();

  GgufKeys keys(path, gguf);
  const auto alignment =
      static_cast<uint64_t>(keys.Integer("general.alignment", 1, kMaxAlignment, kDefaultAlignment));
  if (!keys.status().ok()) return keys.status();
  if (!std::has_single_bit(alignment)) {
    return Mismatch(path, "key \"general.alignment\"", "a power of two",
                    fmt::format("{}", alignment));
  }
  const uint64_t data_start =
      std::min<uint64_t>((cursor.offset() + alignment - 1) / alignment * alignment, bytes.size());
  const std::string_view data = bytes.substr(data_start);
  for (auto& [tensor, offset] : entries) {
    const std::string where = fmt::format("tensor {}", Quoted(tensor.name));
    if (offset % alignment != 0) {
      return Mismatch(path, where, fmt::format("an offset that is a multiple of {}", alignment),
                      fmt::format("{}", offset));
    }
    if (offset > data.size() || tensor.bytes > data.size() - offset) {
      return Mismatch(path, where,
                      fmt::format("{} bytes at offset {} of the data", tensor.bytes, offset),
                      fmt::format("data of {} bytes", data.size()));
    }
    tensor.data = reinterpret_cast<const std::byte*>(data.data()) + offset;
    gguf.tensors.push_back(std::move(tensor));
  }
  // Tensors that share bytes would make a small file a large model.
  std::ranges::sort(gguf.tensors, {}, &StoredTensor::data);
  for (size_t i = 1; i < gguf.tensors.size(); ++i) {
    const StoredTensor& before = gguf.tensors[i - 1];
    if (gguf.tensors[i].data < before.data + before.bytes) {
      return Mismatch(path, fmt::format("tensor {}", Quoted(gguf.tensors[i].name)),
                      "data of its own", fmt::format("bytes of tensor {}", Quoted(before.name)));
    }
  }
  std::ranges::sort(gguf.tensors, {}, &StoredTensor::name);
  const auto twice = std::ranges::adjacent_find(gguf.tensors, {}, &StoredTensor::name);
  if (twice != gguf.tensors.end()) {
    return Mismatch(path, fmt::format("tensor {}", Quoted(twice->name)), "it once", "it twice");
  }
  return gguf;
}

uint32_t GgufNumberOf(BlockType type) {
  return std::ranges::find(kTensorTypes, type, &TensorType::type)->id;
}

void GgufKeys::Expected(std::string_view key, std::string_view expected, std::string_view got) {
  Fail(Mismatch(path_, fmt::format("key {}", Quoted(key)), expected, got));
}

const GgufValue* GgufKeys::Value(std::string_view key, bool required) {
  const auto found = gguf_.metadata.find(key);
  if (found != gguf_.metadata.end()) return &found->second;
  if (required) Expected(key, "a value", "none");
  return nullptr;
}

int64_t GgufKeys::Integer(std::string_view key, int64_t low, int64_t high,
                          std::optional<int64_t> fallback) {
  const GgufValue* value = Value(key, !fallback);
  if (value == nullptr) return fallback.value_or(0);
  bool is_integer;
  const int64_t integer = IntegerAt(value->type, value->bytes.data(), &is_integer);
  if (is_integer && low <= integer && integer <= high) return integer;
  Expected(key,
           low == high ? fmt::format("{}", low) : fmt::format("an integer in {}..{}", low, high),
           is_integer ? fmt::format("{}", integer) : std::string(FactsOf(value->type).name));
  return fallback.value_or(0);
}

double GgufKeys::Positive(std::string_view key, double high, std::optional<double> fallback) {
  const GgufValue* value = Value(key, !fallback);
  if (value == nullptr) return fallback.value_or(0);
  double number = 0;
  if (value->type == GgufType::kFloat32) {
    float single;
    std::memcpy(&single, value->bytes.data(), sizeof(single));
    number = single;
  } else if (value->type == GgufType::kFloat64) {
    std::memcpy(&number, value->bytes.data(), sizeof(number));
  } else {
    Expected(key, "a float", FactsOf(value->type).name);
    return fallback.value_or(0);
  }
  if (number <= high && static_cast<float>(number) > 0) return number;
  Expected(key, fmt::format("a 32-bit float above 0 and at most {}", high),
           fmt::format("{}", number));
  return fallback.value_or(0);
}

bool GgufKeys::Bool(std::string_view key, bool fallback) {
  const GgufValue* value = Value(key, false);
  if (value == nullptr) return fallback;
  if (value->type == GgufType::kBool) return value->bytes[0] != 0;
  Expected(key, "a bool", FactsOf(value->type).name);
  return fallback;
}

std::string_view GgufKeys::String(std::string_view key, std::optional<std::string_view> fallback) {
  const GgufValue* value = Value(key, !fallback);
  if (value == nullptr) return fallback.value_or("");
  if (value->type == GgufType::kString) return value->bytes;
  Expected(key, "a string", FactsOf(value->type).name);
  return fallback.value_or("");
}

bool GgufKeys::AtMost(std::string_view key, const GgufValue& array, uint64_t most) {
  if (array.count <= most) return true;
  Expected(key, fmt::format("at most {} elements", most), fmt::format("{}", array.count));
  return false;
}

std::vector<std::string_view> GgufKeys::Strings(std::string_view key, uint64_t most) {
  std::vector<std::string_view> strings;
  const GgufValue* value = Value(key, true);
  if (value == nullptr) return strings;
  if (value->type != GgufType::kArray || value->element != GgufType::kString) {
    Expected(key, "an array of strings", FactsOf(value->type).name);
    return strings;
  }
  if (!AtMost(key, *value, most)) return strings;
  strings.reserve(value->count);
  for (std::string_view left = value->bytes; !left.empty();) {
    uint64_t size;
    std::memcpy(&size, left.data(), sizeof(size));
    strings.push_back(left.substr(sizeof(size), size));
    left.remove_prefix(sizeof(size) + size);
  }
  return strings;
}

std::vector<int64_t> GgufKeys::Integers(std::string_view key, uint64_t most) {
  std::vector<int64_t> integers;
  const GgufValue* value = Value(key, true);
  if (value == nullptr || !AtMost(key, *value, most)) return integers;
  bool is_integer = value->type == GgufType::kArray;
  const uint64_t step = FactsOf(value->element).bytes;
  for (uint64_t i = 0; is_integer && i < value->count; ++i) {
    integers.push_back(IntegerAt(value->element, value->bytes.data() + i * step, &is_integer));
  }
  if (!is_integer) Expected(key, "an array of integers", FactsOf(value->type).name);
  return integers;
}

}  // namespace espalier
