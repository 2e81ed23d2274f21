#include "engine/model/files/hf_folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <set>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "engine/model/files/architecture.h"
#include "engine/model/files/file_error.h"
#include "engine/model/files/hf_tokenizer.h"
#include "engine/model/files/json_keys.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/files/safetensors.h"

namespace espalier {
namespace {

using NamePair = std::pair<std::string_view, std::string_view>;  // Hugging Face's, GGUF's

constexpr NamePair kModelNames[] = {
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
};

constexpr NamePair kLayerNames[] = {
    {"input_layernorm.weight", "attn_norm.weight"},
    {"self_attn.q_proj.weight", "attn_q.weight"},
    {"self_attn.k_proj.weight", "attn_k.weight"},
    {"self_attn.v_proj.weight", "attn_v.weight"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"self_attn.q_proj.bias", "attn_q.bias"},
    {"self_attn.k_proj.bias", "attn_k.bias"},
    {"self_attn.v_proj.bias", "attn_v.bias"},
    {"self_attn.q_norm.weight", "attn_q_norm.weight"},
    {"self_attn.k_norm.weight", "attn_k_norm.weight"},
    {"post_attention_layernorm.weight", "ffn_norm.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
};

// "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight". What is not known keeps its name,
// by which CheckTensors will refuse it.
std::string CanonicalName(const std::string& name) {
  const auto lookup = [](std::span<const NamePair> names, std::string_view key) {
    const auto found = std::ranges::find(names, key, &NamePair::first);
    return found == names.end() ? std::string_view() : found->second;
  };
  constexpr std::string_view kLayers = "model.layers.";
  if (!name.starts_with(kLayers)) {
    const std::string_view known = lookup(kModelNames, name);
    return known.empty() ? name : std::string(known);
  }
  const size_t dot = std::min(name.find('.', kLayers.size()), name.size() - 1);
  const std::string_view known = lookup(kLayerNames, std::string_view(name).substr(dot + 1));
  if (known.empty()) return name;
  return fmt::format("blk.{}.{}", name.substr(kLayers.size(), dot - kLayers.size()), known);
}

// Rotary embedding, from "rope_parameters" (newer) or "rope_scaling" and "rope_theta".
void ReadRope(const std::string& path, const Json& json, absl::Status* status,
              ModelConfig& config) {
  JsonKeys root(path, "", json, status);
  const std::string group = root.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const Json& rope = At(json, group);
  if (!rope.is_null() && !rope.is_object()) return root.Expected(group, "an object");
  JsonKeys keys(path, group + ".", rope, status);
  constexpr double kMaxTheta = 1e12;
  const double theta = root.Positive("rope_theta", kMaxTheta, 10000);
  config.rope_theta = static_cast<float>(keys.Positive("rope_theta", kMaxTheta, theta));
  const std::string_view type_key = keys.Has("rope_type") ? "rope_type" : "type";
  const std::string type = keys.String(type_key, "default");
  if (type == "default") return;
  if (type != "llama3") return keys.Unsupported(type_key, "default and llama3");
  RopeScaling& scaling = config.rope_scaling;
  scaling.llama3 = true;
  scaling.factor = static_cast<float>(keys.Positive("factor", 1e6));
  scaling.low_freq_factor = static_cast<float>(keys.Positive("low_freq_factor", 1e6));
  scaling.high_freq_factor = static_cast<float>(keys.Positive("high_freq_factor", 1e6));
  scaling.original_context =
      static_cast<int>(keys.Integer("original_max_position_embeddings", 1, kMaxContext));
  if (status->ok() && scaling.high_freq_factor <= scaling.low_freq_factor) {
    keys.Expected("high_freq_factor", fmt::format("above {}", scaling.low_freq_factor));
  }
}

// Absent keys mean what they mean to transformers; where that depends on the architecture, those
// beside llama, whose files say it all, must say it.
absl::StatusOr<ModelConfig> ReadConfig(const std::string& path, const std::string& folder,
                                       const Json& json) {
  absl::Status status;
  JsonKeys keys(path, "", json, &status);
  const std::string type = keys.String("model_type");
  if (!status.ok()) return status;
  absl::StatusOr<ModelConfig> known = ConfigOfArchitecture(path, keys.Where("model_type"), type);
  if (!known.ok()) return known.status();
  const auto integer = [&](std::string_view key, int64_t high,
                           std::optional<int64_t> fallback = {}) {
    return static_cast<int>(keys.Integer(key, 1, high, fallback));
  };
  ModelConfig config = *std::move(known);
  config.rope_interleaved = false;
  std::error_code ignored;
  config.name = std::filesystem::canonical(folder, ignored).filename().string();
  config.layers = integer("num_hidden_layers", kMaxLayers);
  config.hidden = integer("hidden_size", kMaxWidth);
  config.channels = integer("intermediate_size", kMaxWidth);
  config.heads = integer("num_attention_heads", kMaxWidth);
  const auto if_llama = [&](int value) {
    return config.architecture == Architecture::kLlama ? std::optional(value) : std::nullopt;
  };
  config.kv_heads = integer("num_key_value_heads", kMaxWidth, if_llama(config.heads));
  config.vocabulary = integer("vocab_size", kMaxVocabulary);
  if (!status.ok()) return status;
  // Qwen3 takes 128 for an absent head_dim, whatever its width.
  const int width_of_head = config.hidden / config.heads;
  config.head_dim = integer("head_dim", kMaxHeadDim,
                            config.qk_norm ? std::nullopt : std::optional<int64_t>(width_of_head));
  config.context = integer("max_position_embeddings", kMaxContext, if_llama(2048));
  config.rms_eps = static_cast<float>(keys.Positive("rms_norm_eps", 1, 1e-6));
  config.tied_embeddings = keys.Bool("tie_word_embeddings", false);
  if (keys.String("hidden_act", "silu") != "silu") keys.Unsupported("hidden_act", "silu");
  if (keys.Bool("use_sliding_window", false)) keys.Unsupported("use_sliding_window", "false");
  for (const Json& layer : At(json, "layer_types")) {
    if (layer != "full_attention") keys.Unsupported("layer_types", "full_attention");
  }
  ReadRope(path, json, &status, config);
  if (!status.ok()) return status;
  return config;
}

class HfModel final : public ModelFile {
 public:
  absl::Status Read(const std::string& folder) {
    path_ = folder;
    const std::string config_path = folder + "/config.json";
    const absl::StatusOr<Json> json = ReadJsonObject(config_path);
    if (!json.ok()) return json.status();
    absl::StatusOr<ModelConfig> config = ReadConfig(config_path, folder, *json);
    if (!config.ok()) return config.status();
    config_ = *std::move(config);
    if (absl::Status status = ReadTensors(); !status.ok()) return status;
    // Before the tokenizer sets up as many tokens as the config says there are.
    const auto embedding = Find("token_embd.weight", config_.vocabulary, config_.hidden);
    if (!embedding.ok()) return embedding.status();
    absl::StatusOr<Vocabulary> vocabulary = ReadHfVocabulary(folder, *json, config_.vocabulary);
    if (!vocabulary.ok()) return vocabulary.status();
    vocabulary_ = *std::move(vocabulary);
    return absl::OkStatus();
  }

 private:
  absl::Status ReadTensors() {
    const std::string index_path = path_ + "/model.safetensors.index.json";
    const absl::StatusOr<Json> index = ReadJsonObject(index_path);
    if (absl::IsNotFound(index.status())) {
      if (absl::Status status = AddShard(path_ + "/model.safetensors"); !status.ok()) return status;
    } else if (!index.ok()) {
      return index.status();
    } else if (absl::Status status = AddShards(index_path, *index); !status.ok()) {
      return status;
    }
    std::ranges::sort(tensors_, {}, &StoredTensor::name);
    const auto twice = std::ranges::adjacent_find(tensors_, {}, &StoredTensor::name);
    if (twice == tensors_.end()) return absl::OkStatus();
    return Mismatch(path_, fmt::format("tensor {}", Quoted(twice->name)), "it once", "it twice");
  }

  // {"weight_map": {tensor: file}}
  absl::Status AddShards(const std::string& index_path, const Json& index) {
    absl::Status status;
    const Json& map = At(index, "weight_map");
    if (!map.is_object()) {
      JsonKeys(index_path, "", index, &status).Expected("weight_map", "an object");
      return status;
    }
    JsonKeys keys(index_path, "weight_map.", map, &status);
    std::set<std::string> files;
    for (const auto& [tensor, unused] : map.items()) {
      const std::string file = keys.String(tensor);
      // A name and nothing else, so that an index cannot reach out of its folder.
      if (file.empty() || file.find('/') != std::string::npos) {
        keys.Expected(tensor, "the name of a file in this folder");
      }
      if (!status.ok()) return status;
      files.insert(file);
    }
    for (const std::string& file : files) {
      status.Update(AddShard(fmt::format("{}/{}", path_, file)));
      if (!status.ok()) return status;
    }
    return status;
  }

  absl::Status AddShard(const std::string& path) {
    absl::StatusOr<MappedFile> file = MappedFile::Open(path);
    if (!file.ok()) return file.status();
    absl::StatusOr<std::vector<StoredTensor>> tensors =
        ParseSafetensors(path, file->bytes(), &checksum_);
    if (!tensors.ok()) return tensors.status();
    files_.push_back(*std::move(file));
    for (StoredTensor& tensor : *tensors) {
      if (tensor.name.ends_with(".rotary_emb.inv_freq")) continue;  // follows from the config
      tensor.name = CanonicalName(tensor.name);
      if (config_.tied_embeddings && tensor.name == "output.weight") continue;
      tensors_.push_back(std::move(tensor));
    }
    return absl::OkStatus();
  }

 public:
  std::vector<const MappedFile*> files() const override {
    std::vector<const MappedFile*> files;
    for (const MappedFile& file : files_) files.push_back(&file);
    return files;
  }

 private:
  std::vector<MappedFile> files_;
};

}  // namespace

std::string HfTensorName(std::string_view name) {
  const auto lookup = [](std::span<const NamePair> names, std::string_view key) {
    const auto found = std::ranges::find(names, key, &NamePair::second);
    return found == names.end() ? std::string_view() : found->first;
  };
  constexpr std::string_view kLayers = "blk.";
  if (!name.starts_with(kLayers)) return std::string(lookup(kModelNames, name));
  const size_t dot = name.find('.', kLayers.size());
  if (dot == std::string_view::npos) return "";
  const std::string_view known = lookup(kLayerNames, name.substr(dot + 1));
  if (known.empty()) return "";
  return fmt::format("model.layers.{}.{}", name.substr(kLayers.size(), dot - kLayers.size()),
                     known);
}

absl::StatusOr<std::unique_ptr<ModelFile>> OpenHfFolder(const std::string& folder) {
  auto model = std::make_unique<HfModel>();
  if (absl::Status status = model->Read(folder); !status.ok()) return status;
  return model;
}

}  // namespace espalier
