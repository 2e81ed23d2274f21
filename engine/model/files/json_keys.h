// Untrusted JSON: parsed with bounds, read by key with types, the first fault kept.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace espalier {

using Json = nlohmann::json;

// An object of at most 64 MiB, nested at most 64 deep. `path` is for messages.
absl::StatusOr<Json> ParseJsonObject(const std::string& path, std::string_view bytes);

// The same from a file. NotFound if nothing is there.
absl::StatusOr<Json> ReadJsonObject(const std::string& path);

// The value of `key`, or a null value if there is none or `json` is no object.
const Json& At(const Json& json, std::string_view key);

// `json` as one line of text, quoted and cut, for messages.
std::string Shown(const Json& json);

// Reads typed values of one object. A null counts as absent, as it does in these files. After the
// first fault, which stays in `*status`, reads give their fallback or 0. A key without a fallback
// must be there.
class JsonKeys {
 public:
  // `prefix`: how the object is reached from the file's root, e.g. "rope_scaling.".
  JsonKeys(std::string path, std::string prefix, const Json& object, absl::Status* status)
      : path_(std::move(path)), prefix_(std::move(prefix)), object_(object), status_(status) {}

  bool Has(std::string_view key) const { return !At(object_, key).is_null(); }
  int64_t Integer(std::string_view key, int64_t low, int64_t high,
                  std::optional<int64_t> fallback = {});
  // Above 0, also as a float, and at most `high`.
  double Positive(std::string_view key, double high, std::optional<double> fallback = {});
  bool Bool(std::string_view key, std::optional<bool> fallback = {});
  std::string String(std::string_view key, std::optional<std::string> fallback = {});

  // How messages name `key`.
  std::string Where(std::string_view key) const;
  void Expected(std::string_view key, std::string_view expected);
  void Unsupported(std::string_view key, std::string_view supported);

 private:
  // Null if absent, which is a fault if it is `required`.
  const Json& Value(std::string_view key, bool required);

  std::string path_;
  std::string prefix_;
  const Json& object_;
  absl::Status* status_;
};

}  // namespace espalier
