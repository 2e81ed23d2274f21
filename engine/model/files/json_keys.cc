#include "engine/model/files/json_keys.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/model/files/file_error.h"
#include "engine/model/files/mapped_file.h"

namespace espalier {
namespace {

constexpr size_t kMaxBytes = size_t{64} << 20;  // the largest tokenizer.json known has 34 MB
constexpr int kMaxDepth = 64;                   // what recurses over a document recurses this deep

int Depth(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

absl::StatusOr<Json> ParseJsonObject(const std::string& path, std::string_view bytes) {
  if (bytes.size() > kMaxBytes) {
    return Mismatch(path, "JSON", fmt::format("at most {} bytes", kMaxBytes),
                    fmt::format("{}", bytes.size()));
  }
  if (const int depth = Depth(bytes); depth > kMaxDepth) {
    return Mismatch(path, "JSON", fmt::format("at most {} nested values", kMaxDepth),
                    fmt::format("{}", depth));
  }
  try {
    Json json = Json::parse(bytes);
    if (json.is_object()) return json;
    return Mismatch(path, "JSON", "an object", json.type_name());
  } catch (const Json::parse_error& error) {
    const size_t at = std::min(bytes.size(), error.byte > 0 ? error.byte - 1 : 0);
    return Mismatch(path, fmt::format("offset {}", at), "JSON",
                    at == bytes.size() ? "the end" : Quoted(bytes.substr(at, 16)));
  } catch (const Json::exception& error) {  // a number beyond every float
    return Mismatch(path, "JSON", "numbers that a double can hold", Quoted(error.what()));
  }
}

absl::StatusOr<Json> ReadJsonObject(const std::string& path) {
  const absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  return ParseJsonObject(path, file->bytes());
}

const Json& At(const Json& json, std::string_view key) {
  static const Json kNull;
  if (!json.is_object()) return kNull;
  const auto found = json.find(key);
  return found == json.end() ? kNull : *found;
}

std::string Shown(const Json& json) {
  if (json.is_string()) return Quoted(json.get_ref<const std::string&>());
  const std::string text = json.dump(-1, ' ', true);
  return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

std::string JsonKeys::Where(std::string_view key) const {
  return fmt::format("key {}", Quoted(fmt::format("{}{}", prefix_, key)));
}

void JsonKeys::Expected(std::string_view key, std::string_view expected) {
  const Json& value = At(object_, key);
  status_->Update(Mismatch(path_, Where(key), expected, value.is_null() ? "none" : Shown(value)));
}

void JsonKeys::Unsupported(std::string_view key, std::string_view supported) {
  status_->Update(espalier::Unsupported(path_, Where(key), Shown(At(object_, key)), supported));
}

const Json& JsonKeys::Value(std::string_view key, bool required) {
  const Json& value = At(object_, key);
  if (value.is_null() && required) Expected(key, "a value");
  return value;
}

int64_t JsonKeys::Integer(std::string_view key, int64_t low, int64_t high,
                          std::optional<int64_t> fallback) {
  const Json& value = Value(key, !fallback);
  if (value.is_null()) return fallback.value_or(0);
  // An unsigned value beyond int64 would wrap.
  const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t{INT64_MAX}
                                               : value.is_number_integer();
  if (fits && low <= value.get<int64_t>() && value.get<int64_t>() <= high) {
    return value.get<int64_t>();
  }
  Expected(key, fmt::format("an integer in {}..{}", low, high));
  return fallback.value_or(0);
}

double JsonKeys::Positive(std::string_view key, double high, std::optional<double> fallback) {
  const Json& value = Value(key, !fallback);
  if (value.is_null()) return fallback.value_or(0);
  if (value.is_number()) {
    const double number = value.get<double>();
    if (number <= high && static_cast<float>(number) > 0) return number;
  }
  Expected(key, fmt::format("a 32-bit float above 0 and at most {}", high));
  return fallback.value_or(0);
}

bool JsonKeys::Bool(std::string_view key, std::optional<bool> fallback) {
  const Json& value = Value(key, !fallback);
  if (value.is_boolean()) return value.get<bool>();
  if (!value.is_null()) Expected(key, "true or false");
  return fallback.value_or(false);
}

std::string JsonKeys::String(std::string_view key, std::optional<std::string> fallback) {
  const Json& value = Value(key, !fallback);
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_null()) Expected(key, "a string");
  return fallback.value_or("");
}

}  // namespace espalier
