#include "engine/model/files/architecture.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <vector>

#include "engine/model/files/file_error.h"

namespace espalier {
namespace {

struct ArchitectureFacts {
  Architecture architecture;
  bool gguf_rope_interleaved;
  bool qkv_bias;
  bool qk_norm;
};

constexpr ArchitectureFacts kArchitectures[] = {
    {Architecture::kLlama, true, false, false},
    {Architecture::kQwen2, false, true, false},
    {Architecture::kQwen3, false, false, true},
};

struct TensorShape {
  std::string name;
  int rows;
  int cols;
};

std::vector<TensorShape> ExpectedTensors(const ModelConfig& config) {
  const int hidden = config.hidden;
  const int query_width = config.heads * config.head_dim;
  const int kv_width = config.kv_heads * config.head_dim;
  std::vector<TensorShape> tensors = {{"token_embd.weight", config.vocabulary, hidden},
                                      {"output_norm.weight", 1, hidden}};
  if (!config.tied_embeddings) tensors.push_back({"output.weight", config.vocabulary, hidden});
  for (int layer = 0; layer < config.layers; ++layer) {
    const auto add = [&](std::string_view part, int rows, int cols,
                         std::string_view kind = "weight") {
      tensors.push_back({fmt::format("blk.{}.{}.{}", layer, part, kind), rows, cols});
    };
    add("attn_norm", 1, hidden);
    add("attn_q", query_width, hidden);
    add("attn_k", kv_width, hidden);
    add("attn_v", kv_width, hidden);
    add("attn_output", hidden, query_width);
    add("ffn_norm", 1, hidden);
    add("ffn_gate", config.channels, hidden);
    add("ffn_up", config.channels, hidden);
    add("ffn_down", hidden, config.channels);
    if (config.qkv_bias) {
      add("attn_q", 1, query_width, "bias");
      add("attn_k", 1, kv_width, "bias");
      add("attn_v", 1, kv_width, "bias");
    }
    if (config.qk_norm) {
      add("attn_q_norm", 1, config.head_dim);
      add("attn_k_norm", 1, config.head_dim);
    }
  }
  return tensors;
}

}  // namespace

absl::StatusOr<ModelConfig> ConfigOfArchitecture(const std::string& path, std::string_view where,
                                                 std::string_view name) {
  std::vector<std::string_view> names;
  for (const ArchitectureFacts& facts : kArchitectures) {
    names.push_back(ArchitectureName(facts.architecture));
    if (names.back() != name) continue;
    ModelConfig config;
    config.architecture = facts.architecture;
    config.rope_interleaved = facts.gguf_rope_interleaved;
    config.qkv_bias = facts.qkv_bias;
    config.qk_norm = facts.qk_norm;
    return config;
  }
  return Unsupported(path, where, fmt::format("architecture {}", Quoted(name)),
                     fmt::format("{}", fmt::join(names, ", ")));
}

absl::Status CheckConfig(const std::string& path, const ModelConfig& config,
                         const Vocabulary& vocabulary) {
  if (config.heads % config.kv_heads != 0) {
    return Mismatch(path, "KV heads", fmt::format("a divisor of {} heads", config.heads),
                    fmt::format("{}", config.kv_heads));
  }
  if (config.head_dim < 2 || config.head_dim % 2 != 0) {
    return Mismatch(path, "head dimension", "a positive even number, for rotary pairs",
                    fmt::format("{}", config.head_dim));
  }
  if (static_cast<int64_t>(config.heads) * config.head_dim > kMaxWidth) {
    return Mismatch(path, "heads x head dimension", fmt::format("at most {}", kMaxWidth),
                    fmt::format("{} x {}", config.heads, config.head_dim));
  }
  const std::vector<float> frequencies = InverseFrequencies(config);
  if (!std::ranges::all_of(frequencies, [](float f) { return std::isfinite(f); })) {
    return Mismatch(path, "rotary base and scaling", "frequencies that a float can hold",
                    fmt::format("a base of {}", config.rope_theta));
  }
  if (static_cast<int>(vocabulary.tokens.size()) != config.vocabulary) {
    return Mismatch(path, "tokenizer", fmt::format("{} tokens", config.vocabulary),
                    fmt::format("{}", vocabulary.tokens.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckTensors(const ModelFile& file) {
  const std::vector<TensorShape> expected = ExpectedTensors(file.config());
  for (const auto& [name, rows, cols] : expected) {
    if (const auto found = file.Find(name, rows, cols); !found.ok()) return found.status();
  }
  if (file.tensors().size() == expected.size()) return absl::OkStatus();
  std::unordered_set<std::string_view> names;
  for (const TensorShape& tensor : expected) names.insert(tensor.name);
  const auto odd = std::ranges::find_if(
      file.tensors(), [&](const StoredTensor& tensor) { return !names.contains(tensor.name); });
  return Unsupported(
      file.path(), fmt::format("tensor {}", Quoted(odd->name)), "a tensor of this name",
      fmt::format("those of a plain {}", ArchitectureName(file.config().architecture)));
}

}  // namespace espalier
