#include "engine/model/files/architecture.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <unordered_set>
#include <vector>

#include "engine/model/files/file_error.h"

namespace espalier {
namespace {

constexpr ArchitectureFacts kArchitectures[] = {
    {"llama", Architecture::kLlama, true},
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
    const auto add = [&](std::string_view part, int rows, int cols) {
      tensors.push_back({fmt::format("blk.{}.{}.weight", layer, part), rows, cols});
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
  }
  return tensors;
}

}  // namespace

absl::StatusOr<ArchitectureFacts> FindArchitecture(const std::string& path, std::string_view where,
                                                   std::string_view name) {
  const auto* found = std::ranges::find(kArchitectures, name, &ArchitectureFacts::name);
  if (found != std::end(kArchitectures)) return *found;
  std::vector<std::string_view> names;
  for (const ArchitectureFacts& facts : kArchitectures) names.push_back(facts.name);
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
  return Unsupported(file.path(), fmt::format("tensor {}", Quoted(odd->name)),
                     "a tensor of this name", "those of a plain llama");
}

}  // namespace espalier
