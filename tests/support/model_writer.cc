#include "tests/support/model_writer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <fstream>

namespace espalier {
namespace {

using nlohmann::json;

constexpr int kLayers = 2;
constexpr int kHidden = 16;
constexpr int kHeads = 2;
constexpr int kKvHeads = 1;
constexpr int kHeadDim = 8;
constexpr int kChannels = 24;
constexpr int kVocabulary = 260;
constexpr uint64_t kAlignment = 32;
constexpr std::string_view kTemplate =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";

void OrDie(bool holds, std::string_view what) {
  if (holds) return;
  fmt::print(stderr, "model writer: {}\n", what);
  std::abort();
}

template <typename T>
std::string Raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::string WithLength(std::string_view text) {
  return Raw(uint64_t{text.size()}) + std::string(text);
}

std::string Padded(std::string bytes) {
  bytes.resize((bytes.size() + kAlignment - 1) / kAlignment * kAlignment);
  return bytes;
}

std::string Utf8(int code_point) {
  if (code_point < 0x80) return {static_cast<char>(code_point)};
  return {static_cast<char>(0xC0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 63))};
}

std::vector<std::string> Tokens() {
  std::vector<std::string> tokens;
  int next = 256;  // characters for the bytes that do not print
  for (int byte = 0; byte < 256; ++byte) {
    const bool prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    tokens.push_back(Utf8(prints ? byte : next++));
  }
  for (const char* text : {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "th"}) {
    tokens.emplace_back(text);
  }
  return tokens;
}

struct Matrix {
  std::string gguf_name;
  std::string hf_name;
  int rows;  // 0: a vector
  int cols;
  std::vector<float> values;
};

std::vector<Matrix> Matrices() {
  std::vector<Matrix> matrices;
  int drawn = 0;
  const auto add = [&](std::string gguf_name, std::string hf_name, int rows, int cols) {
    Matrix matrix = {std::move(gguf_name), std::move(hf_name), rows, cols, {}};
    for (int i = 0; i < std::max(rows, 1) * cols; ++i) {
      matrix.values.push_back(static_cast<float>(drawn++) / 4096);
    }
    matrices.push_back(std::move(matrix));
  };
  add("token_embd", "model.embed_tokens", kVocabulary, kHidden);
  for (int i = 0; i < kLayers; ++i) {
    const std::string gguf = fmt::format("blk.{}.", i);
    const std::string hf = fmt::format("model.layers.{}.", i);
    add(gguf + "attn_norm", hf + "input_layernorm", 0, kHidden);
    add(gguf + "attn_q", hf + "self_attn.q_proj", kHeads * kHeadDim, kHidden);
    add(gguf + "attn_k", hf + "self_attn.k_proj", kKvHeads * kHeadDim, kHidden);
    add(gguf + "attn_v", hf + "self_attn.v_proj", kKvHeads * kHeadDim, kHidden);
    add(gguf + "attn_output", hf + "self_attn.o_proj", kHidden, kHeads * kHeadDim);
    add(gguf + "ffn_norm", hf + "post_attention_layernorm", 0, kHidden);
    add(gguf + "ffn_gate", hf + "mlp.gate_proj", kChannels, kHidden);
    add(gguf + "ffn_up", hf + "mlp.up_proj", kChannels, kHidden);
    add(gguf + "ffn_down", hf + "mlp.down_proj", kHidden, kChannels);
  }
  add("output_norm", "model.norm", 0, kHidden);
  return matrices;
}

std::string Values(const Matrix& matrix, bool interleaved_rotary) {
  // GGUF's order of q and k rows: within a head, row i and row i + half come one after the other.
  const bool permuted = interleaved_rotary && (matrix.gguf_name.ends_with("attn_q") ||
                                               matrix.gguf_name.ends_with("attn_k"));
  std::string bytes;
  for (int row = 0; row < std::max(matrix.rows, 1); ++row) {
    const int in_head = row % kHeadDim;
    const int source = permuted ? row - in_head + in_head / 2 + in_head % 2 * (kHeadDim / 2) : row;
    const float* begin = &matrix.values[static_cast<size_t>(source) * matrix.cols];
    bytes.append(reinterpret_cast<const char*>(begin), matrix.cols * sizeof(float));
  }
  return bytes;
}

}  // namespace

TemporaryFolder::TemporaryFolder() {
  std::string name = testing::TempDir() + "/espalier-XXXXXX";
  OrDie(mkdtemp(name.data()) != nullptr, "cannot make " + name);
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryFolder::Write(std::string_view name, std::string_view bytes) const {
  std::ofstream file(path_ / name, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  OrDie(file.good(), "cannot write " + Path(name));
  return Path(name);
}

GgufPart GgufPart::U32(uint32_t value) { return {4, Raw(value)}; }
GgufPart GgufPart::F32(float value) { return {6, Raw(value)}; }
GgufPart GgufPart::Bool(bool value) { return {7, Raw(value)}; }
GgufPart GgufPart::Text(std::string_view value) { return {8, WithLength(value)}; }

GgufPart GgufPart::Texts(const std::vector<std::string>& values) {
  GgufPart part = {9, Raw(uint32_t{8}) + Raw(uint64_t{values.size()})};
  for (const std::string& value : values) part.bytes += WithLength(value);
  return part;
}

GgufPart GgufPart::Integers(const std::vector<int32_t>& values) {
  GgufPart part = {9, Raw(uint32_t{5}) + Raw(uint64_t{values.size()})};
  for (const int32_t value : values) part.bytes += Raw(value);
  return part;
}

void GgufParts::Set(std::string_view key, GgufPart value) {
  for (auto& [name, part] : keys) {
    if (name != key) continue;
    part = std::move(value);
    return;
  }
  keys.emplace_back(key, std::move(value));
}

void GgufParts::Remove(std::string_view key) {
  OrDie(std::erase_if(keys, [&](const auto& each) { return each.first == key; }) == 1, key);
}

GgufTensorPart& GgufParts::tensor(std::string_view name) {
  const auto found = std::ranges::find(tensors, name, &GgufTensorPart::name);
  OrDie(found != tensors.end(), name);
  return *found;
}

void GgufParts::RemoveTensor(std::string_view name) {
  OrDie(std::erase_if(tensors, [&](const auto& each) { return each.name == name; }) == 1, name);
}

std::string GgufParts::Bytes() const {
  std::string bytes = "GGUF" + Raw(version) + Raw(tensor_count.value_or(tensors.size())) +
                      Raw(key_count.value_or(keys.size()));
  for (const auto& [key, part] : keys) bytes += WithLength(key) + Raw(part.type) + part.bytes;
  uint64_t offset = 0;
  for (const GgufTensorPart& tensor : tensors) {
    bytes += WithLength(tensor.name) + Raw(static_cast<uint32_t>(tensor.dims.size()));
    for (const uint64_t dim : tensor.dims) bytes += Raw(dim);
    bytes += Raw(tensor.type) + Raw(tensor.offset.value_or(offset));
    offset += Padded(tensor.data).size();
  }
  bytes = Padded(bytes);
  for (const GgufTensorPart& tensor : tensors) bytes += Padded(tensor.data);
  return bytes;
}

std::string SafetensorsBytes(std::string_view header, std::string_view data) {
  return WithLength(header) + std::string(data);
}

std::string SafetensorsBytes(const std::vector<SafetensorsPart>& tensors) {
  json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const SafetensorsPart& tensor : tensors) {
    const size_t end = data.size() + tensor.data.size();
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {data.size(), end}}};
    data += tensor.data;
  }
  return SafetensorsBytes(header.dump(), data);
}

SafetensorsPart& HfParts::tensor(std::string_view name) {
  const auto found = std::ranges::find(tensors, name, &SafetensorsPart::name);
  OrDie(found != tensors.end(), name);
  return *found;
}

void HfParts::WriteTo(const TemporaryFolder& folder) const {
  const auto write = [&](std::string_view name, const json& content) {
    if (!content.is_null()) folder.Write(name, content.dump());
  };
  write("config.json", config);
  write("tokenizer.json", tokenizer);
  write("tokenizer_config.json", tokenizer_config);
  write("generation_config.json", generation_config);
  if (!chat_template.empty()) folder.Write("chat_template.jinja", chat_template);
  if (!tensors.empty()) folder.Write("model.safetensors", SafetensorsBytes(tensors));
}

GgufParts TinyGguf() {
  GgufParts parts;
  parts.keys = {
      {"general.architecture", GgufPart::Text("llama")},
      {"general.name", GgufPart::Text("tiny")},
      {"llama.block_count", GgufPart::U32(kLayers)},
      {"llama.context_length", GgufPart::U32(128)},
      {"llama.embedding_length", GgufPart::U32(kHidden)},
      {"llama.feed_forward_length", GgufPart::U32(kChannels)},
      {"llama.attention.head_count", GgufPart::U32(kHeads)},
      {"llama.attention.head_count_kv", GgufPart::U32(kKvHeads)},
      {"llama.attention.layer_norm_rms_epsilon", GgufPart::F32(1e-5f)},
      {"llama.rope.freq_base", GgufPart::F32(10000)},
      {"llama.rope.dimension_count", GgufPart::U32(kHeadDim)},
      {"llama.vocab_size", GgufPart::U32(kVocabulary)},
      {"tokenizer.ggml.model", GgufPart::Text("gpt2")},
      {"tokenizer.ggml.pre", GgufPart::Text("smollm")},
      {"tokenizer.ggml.tokens", GgufPart::Texts(Tokens())},
      {"tokenizer.ggml.merges", GgufPart::Texts({"t h"})},
      {"tokenizer.ggml.bos_token_id", GgufPart::U32(257)},
      {"tokenizer.ggml.eos_token_id", GgufPart::U32(258)},
      {"tokenizer.ggml.add_bos_token", GgufPart::Bool(false)},
      {"tokenizer.chat_template", GgufPart::Text(kTemplate)},
  };
  std::vector<int32_t> types(kVocabulary, 1);
  std::fill(types.begin() + 256, types.begin() + 259, 3);
  parts.Set("tokenizer.ggml.token_type", GgufPart::Integers(types));
  for (const Matrix& matrix : Matrices()) {
    GgufTensorPart& tensor = parts.tensors.emplace_back();
    tensor.name = matrix.gguf_name + ".weight";
    tensor.dims.push_back(matrix.cols);
    if (matrix.rows > 0) tensor.dims.push_back(matrix.rows);
    tensor.data = Values(matrix, true);
  }
  return parts;
}

HfParts TinyHf() {
  HfParts parts;
  parts.config = {{"model_type", "llama"},
                  {"num_hidden_layers", kLayers},
                  {"max_position_embeddings", 128},
                  {"hidden_size", kHidden},
                  {"intermediate_size", kChannels},
                  {"num_attention_heads", kHeads},
                  {"num_key_value_heads", kKvHeads},
                  {"rms_norm_eps", 1e-5},
                  {"rope_theta", 10000.0},
                  {"rope_scaling", nullptr},
                  {"vocab_size", kVocabulary},
                  {"tie_word_embeddings", true},
                  {"hidden_act", "silu"}};
  const std::vector<std::string> tokens = Tokens();
  json vocab;
  for (int id = 0; id < kVocabulary; ++id) vocab[tokens[id]] = id;
  json added = json::array();
  for (int id = 256; id < 259; ++id) {
    added.push_back({{"id", id}, {"content", tokens[id]}, {"special", true}, {"lstrip", false}});
  }
  parts.tokenizer = {
      {"added_tokens", added},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Digits"}, {"individual_digits", true}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}}},
      {"post_processor", nullptr},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"t h"}}}}};
  parts.tokenizer_config = {{"bos_token", "<|im_start|>"},
                            {"eos_token", "<|im_end|>"},
                            {"add_bos_token", false},
                            {"chat_template", kTemplate}};
  parts.generation_config = {{"eos_token_id", {258, 256}}};
  for (const Matrix& matrix : Matrices()) {
    SafetensorsPart& tensor = parts.tensors.emplace_back();
    tensor.name = matrix.hf_name + ".weight";
    if (matrix.rows > 0) tensor.shape.push_back(matrix.rows);
    tensor.shape.push_back(matrix.cols);
    tensor.data = Values(matrix, false);
  }
  return parts;
}

}  // namespace espalier
