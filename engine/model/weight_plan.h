// How a model's matrices, and its keys and values, are to be kept in memory: asked for by users,
// decided matrix by matrix.
#pragma once

#include <cstdint>
#include <string_view>

#include "engine/model/files/quant_blocks.h"
#include "kernels/backend.h"
#include "kernels/weight.h"

namespace espalier {

enum class WeightPlan : uint8_t {
  kAuto,  // int4 what the file has as Q4_0 or Q4_1, which loses next to nothing; the rest int8
  kInt4,  // the layers int4, the embedding and the LM head int8
  kInt8,
  kBf16,  // half the memory of f32; loses nothing of a bf16 file
  kF32,   // the reference
};

// As options spell them, in the order of the enum.
constexpr std::string_view kWeightPlanNames[] = {"auto", "int4", "int8", "bf16", "f32"};
constexpr std::string_view WeightPlanName(WeightPlan plan) {
  return kWeightPlanNames[static_cast<int>(plan)];
}

// Measured on SmolLM2-135M: an LM head in int4 alone costs 6 % perplexity.
constexpr WeightType TypeOf(WeightPlan plan, BlockType in_file, bool of_a_layer) {
  if (plan == WeightPlan::kF32) return WeightType::kF32;
  if (plan == WeightPlan::kBf16) return WeightType::kBf16;
  const bool four_bits = in_file == BlockType::kQ4_0 || in_file == BlockType::kQ4_1;
  const bool int4 =
      (plan == WeightPlan::kAuto && four_bits) || (plan == WeightPlan::kInt4 && of_a_layer);
  return int4 ? WeightType::kInt4 : WeightType::kInt8;
}

// What KV is where nothing is said. At 32 sequences reading it takes longer than reading int4
// weights, and int8 halves that: WikiText-2 at 1,024 tokens has a perplexity 0.09 % above fp16's,
// at 8,000 tokens 0.11 % below (SmolLM2-135M). Not where keys have a bias: it makes a few of their
// dimensions many times larger than the rest, which share their scale. Nor for who asks for int8 or
// bf16 weights by name, which is to ask for precision: int8 is 0.25 % from fp32 with fp16 KV.
constexpr KvType DefaultKvType(WeightPlan plan, bool key_bias) {
  if (plan == WeightPlan::kF32) return KvType::kF32;
  const bool precise = plan == WeightPlan::kInt8 || plan == WeightPlan::kBf16;
  return key_bias || precise ? KvType::kF16 : KvType::kInt8;
}

}  // namespace espalier
