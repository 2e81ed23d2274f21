// What one instruction set gives to the CPU backend: a table of functions over plain structs.
//
// The translation units behind this header are compiled with flags that not every machine can run.
// So nothing here, and nothing they include, is an inline function with external linkage that the
// linker could take from them for everybody: only constants, plain structs and pointers.
#pragma once

#include <cstdint>

namespace espalier {

// A tile of a product: kTileOutputs outputs by kTileDepth summed values, of which each kGroup share
// their int8 scales.
// See README.md for how the numbers follow from registers and caches.
inline constexpr int kTileOutputs = 64;
inline constexpr int kTileDepth = 64;
inline constexpr int kGroup = 32;  // kQuantGroup
inline constexpr int kTileGroups = kTileDepth / kGroup;
inline constexpr int kPanelTiles = 16;    // tiles along the summed dimension packed at a time
inline constexpr int kRowBlock = 32;      // rows that pass over a tile while it is in L1
inline constexpr int kMaxTaskRows = 128;  // rows of one TileTask

// A group whose largest value is not above this is quantised to zeros: 127 / max would overflow.
inline constexpr float kTinyGroup = 1e-30f;

// Rows of activations quantised by quantize_row.
struct QuantizedRows {
  int8_t* values = nullptr;    // [rows, groups * kGroup], padding zero
  float* scales = nullptr;     // [rows, groups]
  int32_t* offsets = nullptr;  // [rows, groups]: -128 * sum of the group's values
  int groups = 0;              // of a row, padded to whole tiles
};

// One tile column of one MatMulTarget for some rows of x.
struct TileTask {
  bool int8 = false;
  bool output_rows = true;

  const void* values = nullptr;  // of the weight
  const float* scales = nullptr;
  int64_t row_stride = 0;    // values
  int64_t scale_stride = 0;  // int8: scales from one row (kInputRows: group of rows) to the next
  const int32_t* list = nullptr;  // selected rows; null: all
  int depth = 0;                  // summed values
  int first_output = 0;
  int outputs = 0;  // 1 .. kTileOutputs

  int rows = 0;              // 1 .. kMaxTaskRows
  const float* x = nullptr;  // fp32: first row
  int64_t x_stride = 0;
  QuantizedRows q;  // int8: pointers to the first row

  float* out = nullptr;  // first row, first output of the tile
  int64_t out_stride = 0;
  const float* bias = nullptr;  // of the tile's first output, or null
  bool add = false;
};

// Working memory of one worker for tiles; nothing in it outlives a call.
struct alignas(64) TileScratch {
  uint8_t panel[kPanelTiles * kTileDepth * kTileOutputs * sizeof(float)];
  float sums[kMaxTaskRows * kTileOutputs];
  float scales[kPanelTiles * kTileGroups * kTileOutputs];
  const uint8_t* weight_rows[kTileOutputs];
};

// One query head of one row.
struct AttentionQuery {
  const float* q = nullptr;  // [head_dim]
  float* out = nullptr;      // [head_dim]
  int position = 0;          // sees tokens 0 .. position
};

// Queries that read the same KV head of the same sequence.
inline constexpr int kMaxQueries = 32;
struct AttentionTask {
  bool half = false;  // pages hold fp16
  const uint8_t* pool = nullptr;
  int64_t page_bytes = 0;
  const int32_t* pages = nullptr;
  int kv_heads = 0;
  int kv_head = 0;
  int head_dim = 0;
  float scale = 0;
  int count = 0;                            // 1 .. kMaxQueries
  const AttentionQuery* queries = nullptr;  // by ascending position
  float* scratch = nullptr;                 // AttentionScratchFloats(head_dim) values, 64-aligned
};

// Where the rotated key and the value of one token and KV head go.
struct StoreTask {
  bool half = false;
  uint8_t* key_page = nullptr;    // [head_dim, kPageTokens] of the head
  uint8_t* value_page = nullptr;  // [kPageTokens, head_dim] of the head
  int slot = 0;                   // token in page
  int head_dim = 0;
  const float* key = nullptr;
  const float* value = nullptr;
};

// Partial result of one row and column block of LogitStats.
struct LogitPartial {
  float max = 0;
  int32_t argmax = 0;  // in the block
  float sum = 0;       // of exp(logit - max)
};

struct KernelTable {
  // Quantises `depth` values per group of kGroup: scale = max|x| / 127, round to nearest even.
  // Writes whole tiles. Infinite or NaN input gives a scale that is not finite, so the fault is
  // seen in the product.
  void (*quantize_row)(const float* x, int depth, int8_t* values, float* scales, int32_t* offsets);
  void (*matmul_tile)(const TileTask& task, TileScratch* scratch);
  void (*attention)(const AttentionTask& task);
  void (*store_kv)(const StoreTask& task);
  // x[i] <- x[i] * cosines[i] + partner(x[i]) * sines[i], for each of `heads` heads. Tables are
  // [head_dim], signs included; the partner is the neighbour (interleaved) or half a head away.
  void (*rotate)(float* x, int heads, int head_dim, bool interleaved, const float* cosines,
                 const float* sines);
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int cols, float* out);
  void (*swiglu)(const float* gate, const float* up, int count, float* out);
  // out[i] = values[i] * scales[i / kGroup].
  void (*dequantize_row)(const int8_t* values, const float* scales, int count, float* out);
  LogitPartial (*logit_block)(const float* logits, int count);
};

// One query's running state (sums, lane sums, maximum) and the widened page, for every query.
inline constexpr int64_t kAttentionLanes = 16;
constexpr int64_t PaddedHeadDim(int head_dim) {
  return (head_dim + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes;
}
constexpr int64_t AttentionScratchFloats(int head_dim) {
  return 2 * kAttentionLanes * PaddedHeadDim(head_dim) +
         kMaxQueries * (PaddedHeadDim(head_dim) + 3 * kAttentionLanes);
}

const KernelTable& PortableKernels();
#if defined(__x86_64__)
const KernelTable& Avx2Kernels();
const KernelTable& Avx512Kernels();
#endif

}  // namespace espalier
