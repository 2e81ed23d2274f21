// Every op of Backend once more, slow and obvious, in double: what the kernels are held to. It
// knows neither pages nor tiles nor devices; int8 is done by the rule that the op's contract gives.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace espalier::reference {

// A matrix as it was given to UploadWeight.
struct HostWeight {
  WeightType type = WeightType::kF32;
  WeightLayout layout = WeightLayout::kOutputRows;
  int rows = 0;
  int cols = 0;
  std::vector<float> values;  // [rows, cols]; kInt4: of sixteen steps in each group
};

// What the device keeps of a weight's values; a kInt4 one is made of what 4 bits can hold.
std::vector<float> Kept(const HostWeight& weight);

// Activations in symmetric int8: scale = max|v| / 127, nearest even, both in fp32 as the contract
// says.
struct Quantized {
  std::vector<int> values;
  float scale = 0;
};
Quantized Quantize(std::span<const float> values);

// All results are row-major doubles.
std::vector<double> Embed(const HostWeight& table, std::span<const int32_t> tokens);
std::vector<double> RmsNorm(const ConstMatrix& x, std::span<const float> weight, double eps);
// `channels` as in MatMulTarget; of kInputRows the first so many columns of x are looked at.
std::vector<double> MatMul(const ConstMatrix& x, const HostWeight& weight, int channels,
                           std::span<const float> bias);
std::vector<double> SwiGlu(const ConstMatrix& gate, const ConstMatrix& up);

// Rotates row r of x by positions[r].
std::vector<double> Rotate(const ConstMatrix& x, std::span<const int32_t> positions,
                           std::span<const float> inverse_frequency, RopePairing pairing);

// One query row at the last of `tokens` positions; k and v are [tokens, kv_heads * head_dim].
std::vector<double> Attention(std::span<const float> q, std::span<const int32_t> heads_kept,
                              int heads, int kv_heads, int head_dim, double scale,
                              std::span<const float> k, std::span<const float> v, int tokens);

struct LogitStats {
  float max = 0;
  int argmax = 0;
  double log_sum_exp = 0;
};
LogitStats StatsOf(std::span<const float> logits);

// The nearest value of 8 significant bits (ties to even); not for subnormals.
float RoundToBf16(float v);

// The nearest fp16 value (ties to even), no larger than the largest finite one.
float RoundToHalf(float v);

}  // namespace espalier::reference
