// A model's dimensions: plain data that everyone in the engine may know.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "policy/keep_profile.h"

namespace espalier {

enum class Architecture : uint8_t { kLlama, kQwen2, kQwen3 };

// "llama", "qwen2", "qwen3": GGUF's general.architecture and config.json's model_type.
constexpr std::string_view ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return "llama";
    case Architecture::kQwen2:
      return "qwen2";
    case Architecture::kQwen3:
      return "qwen3";
  }
  return "unknown";
}

// Rotary frequency scaling of Llama 3.1 and later ("rope_type": "llama3"): low frequencies divided
// by `factor`, high ones kept, in between interpolated.
struct RopeScaling {
  bool llama3 = false;
  float factor = 1;
  float low_freq_factor = 1;
  float high_freq_factor = 4;
  int original_context = 8192;  // tokens
};

struct ModelConfig {
  std::string name;  // as the file says, or the file's stem
  Architecture architecture = Architecture::kLlama;
  int layers = 0;
  int hidden = 0;      // width of the residual stream
  int heads = 0;       // query heads
  int kv_heads = 0;    // divides heads
  int head_dim = 0;    // even; heads * head_dim need not be hidden
  int channels = 0;    // MLP hidden channels
  int vocabulary = 0;  // rows of the embedding
  int context = 0;     // longest position the model was trained for, tokens
  float rms_eps = 1e-5f;
  float rope_theta = 10000.0f;
  RopeScaling rope_scaling;
  bool rope_interleaved = false;  // pairs (2i, 2i+1) instead of (i, i + head_dim/2)
  bool tied_embeddings = false;   // LM head = token embedding
  bool qkv_bias = false;          // q, k and v have a bias
  bool qk_norm = false;           // each head of q and k is RMS-normed before rotation

  SiteWidths sites() const { return {.layers = layers, .heads = heads, .channels = channels}; }
  // Columns of the weight behind a site: of `o`, which has head_dim for each head, or of `down`.
  int columns(SiteKind kind) const {
    return kind == SiteKind::kHeads ? heads * head_dim : channels;
  }
};

// 1 / theta^(2i / head_dim) for i in [0, head_dim / 2), with rope_scaling applied.
std::vector<float> InverseFrequencies(const ModelConfig& config);

}  // namespace espalier
