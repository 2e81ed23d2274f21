// The architectures that can be run, and the config and tensors each needs.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model_config.h"

namespace espalier {

// Far above any model known, and low enough that no product of two overflows 64 bits.
inline constexpr int kMaxLayers = 1024;
inline constexpr int kMaxWidth = 1 << 20;  // residual stream, channels, heads * head_dim
inline constexpr int kMaxHeadDim = 1024;
inline constexpr int kMaxVocabulary = 1 << 24;
inline constexpr int kMaxContext = 1 << 28;

// What the name alone says of a model: architecture, qkv_bias, qk_norm, and rope_interleaved as it
// is in GGUF, where llama's converter permutes q and k rows. Unimplemented, naming the
// architectures there are, if `name` is none of them. `where`: the key.
absl::StatusOr<ModelConfig> ConfigOfArchitecture(const std::string& path, std::string_view where,
                                                 std::string_view name);

// Whether the dimensions, each within its own limits, fit each other and the vocabulary.
absl::Status CheckConfig(const std::string& path, const ModelConfig& config,
                         const Vocabulary& vocabulary);

// Whether the file has all tensors of the architecture in the shapes that config() says, and no
// other: one more (a bias, an expert, rotary factors) means a model that we would compute wrongly.
absl::Status CheckTensors(const ModelFile& file);

}  // namespace espalier
