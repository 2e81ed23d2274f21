// What one instruction set gives to the CPU backend: a table of functions over plain structs.
//
// The translation units behind this header are compiled with flags that not every machine can run.
// So nothing here, and nothing they include, is an inline function with external linkage that the
// linker could take from them for everybody: only constants, plain structs and pointers.
#pragma once

#include <cstdint>

namespace espalier {

// A block of a weight: kStripOutputs outputs by kGroup summed values, of which those of one output
// share their scale. weight_blocks.h has the layouts, README.md how the numbers follow from
// registers and caches.
inline constexpr int kStripOutputs = 16;
inline constexpr int kGroup = 32;        // kQuantGroup
inline constexpr int kBlockHeader = 64;  // bytes: fp16 scales and minimums
inline constexpr int kTaskStrips = 4;    // strips of one MatMulTask
inline constexpr int kTaskOutputs = kTaskStrips * kStripOutputs;
inline constexpr int kChunkGroups = 8;    // groups that rows pass over while they are in L1
inline constexpr int kMaxTaskRows = 128;  // rows of one MatMulTask

constexpr int64_t BlockBytes(int bits) {
  return kStripOutputs * kGroup * bits / 8 + (bits > 8 ? 0 : kBlockHeader);
}

// A group whose largest value is not above this is quantised to zeros: 127 / max would overflow.
inline constexpr float kTinyGroup = 1e-30f;

// Rows of activations quantised by quantize_row.
struct QuantizedRows {
  int8_t* values = nullptr;   // [rows, stride]; padding of a group zero
  int64_t stride = 0;         // >= groups * kGroup
  float* scales = nullptr;    // [rows, groups]
  float* sums = nullptr;      // [rows, groups]: scale * sum of the group's values
  int32_t* counts = nullptr;  // [rows, groups]: sum of the group's values
  int groups = 0;             // of a row
};

// Some strips of one MatMulTarget for some rows of x.
struct MatMulTask {
  int bits = 32;                         // 32, 16 (bf16), 8 or 4
  const uint8_t* strips = nullptr;       // blocks of the first strip
  int64_t strip_bytes = 0;               // from a strip to the next
  const uint8_t* next_strips = nullptr;  // what this worker will probably be given then; null: none
  int64_t next_strip_bytes = 0;
  int groups = 0;   // summed
  int depth = 0;    // values summed of a row of x; floats
  int outputs = 0;  // 1 .. kTaskOutputs

  int rows = 0;              // 1 .. kMaxTaskRows
  const float* x = nullptr;  // floats: first row
  int64_t x_stride = 0;
  QuantizedRows q;  // integers: pointers to the first row

  float* out = nullptr;  // first row, first output of the task
  int64_t out_stride = 0;
  const float* bias = nullptr;  // of the task's first output, or null
  bool add = false;
};

// Working memory of one worker for products; nothing in it outlives a call.
struct alignas(64) MatMulScratch {
  float sums[kMaxTaskRows * kTaskOutputs];
  uint8_t values[kChunkGroups * kTaskStrips * kStripOutputs * kGroup];
  float scales[kChunkGroups * kTaskOutputs];
  float minimums[kChunkGroups * kTaskOutputs];
  const uint8_t* blocks[kChunkGroups * kTaskStrips];
  float widened[kTaskStrips][kStripOutputs * kGroup];  // bf16: a group of each strip
};

// One worker's part of a gated MLP: gate and up of a task, then their product.
struct alignas(64) ChannelsTile {
  float gate[kMaxTaskRows * kTaskOutputs];
  float up[kMaxTaskRows * kTaskOutputs];
};

// One query head of one row.
struct AttentionQuery {
  const float* q = nullptr;  // [head_dim]
  float* out = nullptr;      // [head_dim]
  int position = 0;          // sees tokens 0 .. position
  int kv_head = 0;
};

// Queries that read the same sequence.
inline constexpr int kMaxQueries = 64;
struct AttentionTask {
  int bits = 32;  // of the pages' values: 32, 16, 8 or 4; of 4 a page holds twice the tokens
  const uint8_t* pool = nullptr;
  int64_t page_bytes = 0;
  int64_t head_bytes = 0;  // K or V of a head in a page
  const int32_t* pages = nullptr;
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 0;
  int count = 0;                            // 1 .. kMaxQueries
  const AttentionQuery* queries = nullptr;  // by KV head, then by position, ascending
  float* scratch = nullptr;                 // AttentionScratchFloats(head_dim) values, 64-aligned
};

// Where the rotated key and the value of one token and KV head go.
struct StoreTask {
  int bits = 32;
  uint8_t* key_page = nullptr;    // of the head, as KvPoolShape says
  uint8_t* value_page = nullptr;  // of the head
  int slot = 0;                   // token in page
  int head_dim = 0;
  const float* key = nullptr;
  const float* value = nullptr;
  const float* key_mean = nullptr;  // 4 bits: [head_dim], left out of the key; null: nothing is
};

// K or V of a head in two int8 pages, which becomes one of four bits.
struct PackKvTask {
  const uint8_t* from[2] = {};  // the second may be null: its tokens are not there
  uint8_t* to = nullptr;        // may be one of `from`
  bool keys = false;
  int head_dim = 0;
  const float* mean = nullptr;  // [head_dim], left out; null: nothing is
  float* scratch = nullptr;     // [32, head_dim], 64-aligned
};
// Heads of more dimensions, or of other than a multiple of 8, are not kept in four bits.
inline constexpr int kMostInt4HeadDim = 256;

// Partial result of one row and column block of LogitStats.
struct LogitPartial {
  float max = 0;
  int32_t argmax = 0;  // in the block
  float sum = 0;       // of exp(logit - max)
};

struct KernelTable {
  // Packs values[k][output], k < depth, into a block of 8 or 4 bits: the nearest of steps between
  // the smallest and the largest value; 4 bits look for the steps of a 4-bit source first, and fit
  // them by least squares if there are none. False if a scale or minimum does not fit fp16. The
  // same bits on every instruction set.
  bool (*pack_integers)(int bits, const float (*values)[kStripOutputs], int depth, uint8_t* block);
  // Lays the listed inputs of a strip of `groups` groups of 8 or 4 bits into a strip of 8 bits with
  // one scale and minimum for each output, which span all its groups: within half a step of what
  // they were, and a 240th of that range a step. `steps`: room for 2 * groups * kStripOutputs
  // floats. The same bits on every instruction set.
  void (*gather_integers)(int bits, const uint8_t* strip, int groups, const int32_t* inputs,
                          int count, float* steps, uint8_t* to);
  // Lays sixteen outputs of a weight whose strips are `strip_bytes` long, of `groups` groups each,
  // into a strip of their own, bit for bit. Quick where neighbours are of one strip. `blocks` and
  // `to` are 64-aligned.
  void (*gather_outputs)(int bits, const uint8_t* blocks, int64_t strip_bytes,
                         const int32_t* outputs, int groups, uint8_t* to);
  // Quantises `depth` values per group of kGroup: scale = max|x| / 127, round to nearest even.
  // Writes whole groups. Infinite or NaN input gives a scale that is not finite, so the fault is
  // seen in the product.
  void (*quantize_row)(const float* x, int depth, int8_t* values, float* scales, float* sums,
                       int32_t* counts);
  void (*matmul)(const MatMulTask& task, MatMulScratch* scratch);
  void (*attention)(const AttentionTask& task);
  void (*store_kv)(const StoreTask& task);
  void (*pack_kv)(const PackKvTask& task);
  // x[i] <- x[i] * cosines[i] + partner(x[i]) * sines[i], for each of `heads` heads. Tables are
  // [head_dim], signs included; the partner is the neighbour (interleaved) or half a head away.
  void (*rotate)(float* x, int heads, int head_dim, bool interleaved, const float* cosines,
                 const float* sines);
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int cols, float* out);
  void (*swiglu)(const float* gate, const float* up, int count, float* out);
  LogitPartial (*logit_block)(const float* logits, int count);
};

// Pages of a sequence that queries see at a time: a softmax, and a pass over sums, for each 64
// tokens.
inline constexpr int kBlockPages = 4;
// The widened block, and of every query what it has seen and what it needs of the block at hand.
inline constexpr int64_t kAttentionLanes = 16;
constexpr int64_t PaddedHeadDim(int head_dim) {
  return (head_dim + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes;
}
// Sums, a share of the denominator, scores, a few numbers and the query in two bytes a dimension.
constexpr int64_t QueryStateFloats(int head_dim) {
  return PaddedHeadDim(head_dim) + (2 + kBlockPages) * kAttentionLanes +
         PaddedHeadDim(PaddedHeadDim(head_dim) / 2);
}
// A block of int4 pages as bytes: K and V, with scales.
constexpr int64_t OpenedPagesFloats(int head_dim) {
  return 2 * kBlockPages * kAttentionLanes * (1 + PaddedHeadDim(head_dim) / 4);
}
constexpr int64_t AttentionScratchFloats(int head_dim) {
  return 2 * kBlockPages * kAttentionLanes * PaddedHeadDim(head_dim) +
         kMaxQueries * QueryStateFloats(head_dim) + OpenedPagesFloats(head_dim);
}

const KernelTable& PortableKernels();
#if defined(__x86_64__)
const KernelTable& Avx2Kernels();
const KernelTable& AvxVnniKernels();
const KernelTable& Avx512Kernels();
#if defined(ESPALIER_AMX)
void AmxMatMul(const MatMulTask& task, MatMulScratch* scratch);
#endif
#endif

}  // namespace espalier
