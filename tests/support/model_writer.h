// Writes tiny llama models for tests, as GGUF or as a Hugging Face folder, right or wrong on
// purpose.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace espalier {

// A folder of its own under the tests' temporary folder, removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string Path(std::string_view name) const { return (path_ / name).string(); }
  // Writes a file and returns its path.
  std::string Write(std::string_view name, std::string_view bytes) const;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// One value as GGUF stores it: the number of its type and its bytes.
struct GgufPart {
  uint32_t type;
  std::string bytes;

  static GgufPart U32(uint32_t value);
  static GgufPart F32(float value);
  static GgufPart Bool(bool value);
  static GgufPart Text(std::string_view value);
  static GgufPart Texts(const std::vector<std::string>& values);
  static GgufPart Integers(const std::vector<int32_t>& values);
};

struct GgufTensorPart {
  std::string name;
  std::vector<uint64_t> dims;  // fastest first
  uint32_t type = 0;           // ggml's number; 0: F32
  std::string data;
  std::optional<uint64_t> offset;  // where it says it lies, if not where it does
};

struct GgufParts {
  uint32_t version = 3;
  std::vector<std::pair<std::string, GgufPart>> keys;
  std::vector<GgufTensorPart> tensors;
  std::optional<uint64_t> key_count;  // what the header says, if not the truth
  std::optional<uint64_t> tensor_count;

  void Set(std::string_view key, GgufPart value);  // replaces or appends
  void Remove(std::string_view key);
  GgufTensorPart& tensor(std::string_view name);
  void RemoveTensor(std::string_view name);
  std::string Bytes() const;
};

struct SafetensorsPart {
  std::string name;
  std::vector<uint64_t> shape;  // rows, columns
  std::string dtype = "F32";
  std::string data;
};

// A file whose header lists the tensors in order, end to end.
std::string SafetensorsBytes(const std::vector<SafetensorsPart>& tensors);
// A file with this header, whatever it says.
std::string SafetensorsBytes(std::string_view header, std::string_view data);

// The files of a folder; what is null or empty is not written.
struct HfParts {
  nlohmann::json config;
  nlohmann::json tokenizer;
  nlohmann::json tokenizer_config;
  nlohmann::json generation_config;
  std::string chat_template;  // chat_template.jinja
  std::vector<SafetensorsPart> tensors;

  SafetensorsPart& tensor(std::string_view name);
  void WriteTo(const TemporaryFolder& folder) const;
};

// Two layers, hidden 16, 2 heads over 1 KV head of 8, 24 channels, F32, tied; 260 tokens: the bytes
// as SmolLM spells them, then "<|endoftext|>" 256, "<|im_start|>" 257, "<|im_end|>" 258 and "th"
// 259, made by the one merge. Every weight differs; both forms hold the same model.
GgufParts TinyGguf();
HfParts TinyHf();

}  // namespace espalier
