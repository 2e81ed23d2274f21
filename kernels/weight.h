// A weight matrix on a device, laid out so that a prunable channel is one contiguous row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace espalier {

enum class WeightType : uint8_t {
  kF32,   // reference: fp32 values
  kInt8,  // int8 values with fp32 scales, see WeightLayout for what a scale covers
};

// What a row of the stored matrix stands for.
enum class WeightLayout : uint8_t {
  // A row is an output channel: q, k, v, gate, up, embedding, LM head. Stored [out, in].
  // out[m][i] = sum_k x[m][k] * w[row_i][k]. Int8: one scale per row and group of kQuantGroup
  // consecutive inputs.
  kOutputRows,
  // A row is an input channel: o and down, stored transposed, [in, out].
  // out[m][n] = sum_i x[m][i] * w[row_i][n]. Int8: one scale per output and group of kQuantGroup
  // consecutive stored rows, so along the summed dimension here too. All rows and panels are
  // multiplied as they lie; a list mixes the groups of its rows and is made a panel first.
  kInputRows,
};

// Values that share one int8 scale, along the summed dimension; activations use the same groups.
// Measured on SmolLM2-135M, perplexity of 6 windows above fp32: 0.30 %. One scale for a whole row
// of o and down instead: 0.73 % with column scales, several percent without.
inline constexpr int kQuantGroup = 32;

// Owned by the backend that made it; immutable after Backend::UploadWeight.
struct Weight {
  WeightType type = WeightType::kF32;
  WeightLayout layout = WeightLayout::kOutputRows;
  int rows = 0;                   // channels
  int cols = 0;                   // values per row
  int64_t row_stride = 0;         // stored values from one row to the next: cols padded to 64
  std::shared_ptr<void> storage;  // device memory: values, then scales
  const void* values = nullptr;   // float or int8 [rows, row_stride], padding zero
  // Int8 only. kOutputRows: [rows, row_stride / kQuantGroup]; kInputRows: [groups of rows,
  // row_stride].
  const float* scales = nullptr;
  size_t bytes = 0;  // of storage, for the ledger
};

}  // namespace espalier
