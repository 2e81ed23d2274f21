// A weight matrix on a device, packed once when it is loaded, in the order that products read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

namespace espalier {

// How a value is kept. Integers stand for scale * u + minimum, with an fp16 scale and minimum for
// each output and group of kQuantGroup summed values.
enum class WeightType : uint8_t {
  kF32,   // reference: fp32 values
  kBf16,  // the upper halves of fp32, to nearest even: a bf16 file's values, bit for bit
  kInt8,  // u in 0 .. 240: the steps of a Q4_1 file are every sixteenth of them
  kInt4,  // u in 0 .. 15: what a Q4_1 file holds, bit for bit; Q4_0 to 1/300 of a step
};

constexpr std::string_view WeightTypeName(WeightType type) {
  constexpr std::string_view kNames[] = {"f32", "bf16", "int8", "int4"};
  return kNames[static_cast<int>(type)];
}

// Products of floats are summed in fp32 with x as it is; for integers x is quantised.
constexpr bool IsFloat(WeightType type) {
  return type == WeightType::kF32 || type == WeightType::kBf16;
}

// What a row of the matrix stands for, and so what a selection of its rows means.
enum class WeightLayout : uint8_t {
  // A row is an output channel: q, k, v, gate, up, embedding, LM head. [out, in].
  // out[m][i] = sum_k x[m][k] * w[row_i][k].
  kOutputRows,
  // A row is an input channel: o and down, [in, out], transposed in files.
  // out[m][n] = sum_i x[m][i] * w[row_i][n].
  kInputRows,
};

// Values that share a scale, along the summed dimension; activations use the same groups. Measured
// on SmolLM2-135M, perplexity above fp32 with exact weights and activations in int8 by groups of
// 32 / 64 / 128 / a row: 0.22 / 0.20 / 0.97 / 2.9 %. 32 is what 4-bit files use.
inline constexpr int kQuantGroup = 32;

// A group of a 4-bit source: scale * u + minimum. It is a block of Q4_1.
struct FourBitGroup {
  uint16_t scale;              // fp16
  uint16_t minimum;            // fp16
  uint8_t u[kQuantGroup / 2];  // of value i in the low nibble, of value i + 16 in the high one
};

// A matrix as files hold it, output by output: what an output sums lies together. Called from
// several threads, each output once.
struct WeightSource {
  // Fills the values that output n sums: row n of kOutputRows (`cols` values), column n of
  // kInputRows (`rows` values).
  std::function<void(int output, float* dst)> read_values;
  // The same as groups, where the source is made of whole ones; else empty. int4 keeps them bit for
  // bit, in a tenth of the time.
  std::function<void(int output, FourBitGroup* dst)> read_groups = {};
};

// Owned by the backend that made it; immutable after Backend::UploadWeight, but for being released.
struct Weight {
  WeightType type = WeightType::kF32;
  WeightLayout layout = WeightLayout::kOutputRows;
  int rows = 0;                     // channels
  int cols = 0;                     // values per row
  int groups = 0;                   // of the summed dimension, as stored
  std::shared_ptr<void> storage;    // device memory
  const uint8_t* blocks = nullptr;  // [strips of outputs, groups] in the device's own order; null:
                                    // released, or none
  size_t bytes = 0;                 // of storage, for the ledger
  bool sparse24 = false;            // seen in its values when they were uploaded (sparse24.h)
  size_t releasable = 0;            // of these, what Backend::ReleaseWeight gives back
};

}  // namespace espalier
