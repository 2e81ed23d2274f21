// The GGUF container: metadata and tensor table, every count and offset checked against the file.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"

namespace espalier {

enum class GgufType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

// A metadata value, left where it lies in the file.
struct GgufValue {
  GgufType type = GgufType::kUint8;
  GgufType element = GgufType::kUint8;  // of an array
  uint64_t count = 0;                   // of an array's elements
  std::string_view bytes;               // the scalar, the string's characters, the elements
};

// Views into the bytes that were parsed.
struct Gguf {
  std::map<std::string_view, GgufValue> metadata;
  std::vector<StoredTensor> tensors;  // sorted by name
};

// The format's number of a block type.
uint32_t GgufNumberOf(BlockType type);

// Version 2 or 3, little endian. `path` is for messages.
absl::StatusOr<Gguf> ParseGguf(const std::string& path, std::string_view bytes);

// Reads typed values; the first fault stays in status() and later reads give their fallback or 0.
// A key without a fallback must be there.
class GgufKeys {
 public:
  GgufKeys(const std::string& path, const Gguf& gguf) : path_(path), gguf_(gguf) {}

  bool Has(std::string_view key) const { return gguf_.metadata.contains(key); }
  int64_t Integer(std::string_view key, int64_t low, int64_t high,
                  std::optional<int64_t> fallback = {});
  // Above 0, also as a float, and at most `high`.
  double Positive(std::string_view key, double high, std::optional<double> fallback = {});
  bool Bool(std::string_view key, bool fallback);
  std::string_view String(std::string_view key, std::optional<std::string_view> fallback = {});
  // At most `most` elements, which is checked before there is memory for any.
  std::vector<std::string_view> Strings(std::string_view key, uint64_t most);
  std::vector<int64_t> Integers(std::string_view key, uint64_t most);

  void Fail(absl::Status status) { status_.Update(status); }
  const absl::Status& status() const { return status_; }

 private:
  // Null if absent, which is a fault if it is `required`.
  const GgufValue* Value(std::string_view key, bool required);
  // Whether an array has at most `most` elements; a fault if not.
  bool AtMost(std::string_view key, const GgufValue& array, uint64_t most);
  void Expected(std::string_view key, std::string_view expected, std::string_view got);

  const std::string& path_;
  const Gguf& gguf_;
  absl::Status status_;
};

}  // namespace espalier
