// How bits are multiplied: the one interface between a model's forward pass and a device.
//
// Every op takes one argument struct (designated initialisers at the call site read as named
// parameters), only enqueues, returns nothing and is never optional. Results are there, and
// device errors are told, after Synchronize(). On the CPU an op is done when it returns.
//
// Shapes: `rows` are tokens of one step; all activations are fp32, row-major. Empty inputs (zero
// rows, zero channels) are legal everywhere and do nothing (or write zeros, where said).
//
// Promise that everything above rests on: an output row depends on its own input row only, bit for
// bit, whatever the other rows of the call, the thread count and the split of a prompt into chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "kernels/weight.h"

namespace espalier {

// kInt8: symmetric, with an fp32 scale for each token and head of K and of V.
enum class KvType : uint8_t { kF32, kF16, kInt8 };

constexpr std::string_view KvTypeName(KvType type) {
  constexpr std::string_view kNames[] = {"f32", "f16", "int8"};
  return kNames[static_cast<int>(type)];
}

// Tokens of one KV page. 16 = the lanes of one AVX-512 register of scores.
inline constexpr int kPageTokens = 16;

// Shape of the paged KV pool. One page holds kPageTokens tokens of one layer: K as
// [kv_heads, head_dim, kPageTokens] (a register of scores needs no horizontal sum), then V as
// [kv_heads, kPageTokens, head_dim]. kInt8: a head's K is scales [kPageTokens], then
// [ceil(head_dim / 4), kPageTokens, 4]; its V is scales, then [kPageTokens, head_dim], padded to
// the size of K.
struct KvPoolShape {
  KvType type = KvType::kF16;
  int pages = 0;
  int kv_heads = 0;
  int head_dim = 0;

  // K or V of one head in a page.
  size_t head_bytes() const {
    const size_t dim = head_dim;
    if (type == KvType::kInt8) return kPageTokens * (sizeof(float) + (dim + 3) / 4 * 4);
    return kPageTokens * dim * (type == KvType::kF16 ? 2 : 4);
  }
  size_t page_bytes() const { return 2 * kv_heads * head_bytes(); }

  // Whether spans may keep K and V in int4 pages: int8 pages that hold twice the tokens, each
  // spread by a Hadamard matrix and rounded to four bits with an fp16 scale for each token and
  // head.
  bool may_be_int4() const { return type == KvType::kInt8 && head_dim % 8 == 0 && head_dim <= 256; }
};
// Tokens of an int4 page.
inline constexpr int kInt4PageTokens = 2 * kPageTokens;

// Device memory of the KV pages; made by Backend::CreateKvPool.
struct KvPool {
  KvPoolShape shape;
  std::shared_ptr<void> storage;
  std::byte* data = nullptr;  // page p at data + p * shape.page_bytes()
};

// How rotary pairs lie in a head. GGUF files of arch llama hold permuted q and k rows and need
// kInterleaved; Hugging Face files and GGUF qwen2 / qwen3 need kHalfSplit.
enum class RopePairing : uint8_t {
  kInterleaved,  // pairs (2i, 2i + 1)
  kHalfSplit,    // pairs (i, i + head_dim / 2)
};

// What one step's rows look like to attention. Made once per step and used by every layer.
// A span is the rows of one sequence in this step: `rows` consecutive rows from `first_row`, at
// positions start, start + 1, ...; every earlier position is in the sequence's pages already.
struct AttentionSpan {
  int first_row = 0;
  int rows = 0;
  int start = 0;         // position of first_row; the row sees positions 0 .. its own
  bool int4_kv = false;  // its pages are int4, of kInt4PageTokens; only where the pool allows it
};

// out[i] = table[tokens[i]], dequantised. `table` is kOutputRows. tokens are in [0, table.rows).
struct EmbedArgs {
  std::span<const int32_t> tokens;
  const Weight& table;
  Matrix out;  // [tokens, table.cols]
};

// out[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * weight, in fp32.
struct RmsNormArgs {
  ConstMatrix x;                  // [rows, cols]
  std::span<const float> weight;  // [cols]
  float eps = 1e-5f;
  Matrix out;  // [rows, cols]; may be x itself
};

// One weight of a MatMul, the rows of x that meet it and where its result goes. Rows of a step that
// keep different numbers of channels are targets of one call: the staircase.
struct MatMulTarget {
  static constexpr int kAll = -1;

  const Weight* weight = nullptr;
  Matrix out;                        // out.rows rows of x take part
  int first_row = 0;                 // row r of out is made of row first_row + r of x
  int channels = kAll;               // the first so many weight rows take part
  std::span<const float> bias = {};  // [out cols] or empty
};

// Products of one input with one or more weights (q, k, v share theirs; so do gate and up), so that
// the input is quantised once. Each target:
//   kOutputRows: out [its rows, channels];    x [rows, weight.cols].
//   kInputRows:  out [its rows, weight.cols]; the first `channels` columns of x, which are all or,
//                for integers, whole groups of kQuantGroup. What lies beyond is not looked at.
// Integer weights quantise x per row and group of kQuantGroup (symmetric int8, round to nearest
// even) and sum groups in fp32, in order; float weights take x as it is. All targets of one call
// share their layout, and are all floats or all integers.
struct MatMulArgs {
  enum class Output : uint8_t { kOverwrite, kAdd };

  ConstMatrix x;
  std::span<const MatMulTarget> targets;
  Output output = Output::kOverwrite;
};

// out = silu(gate) * up, elementwise; silu(v) = v / (1 + exp(-v)). out may be gate or up.
struct SwiGluArgs {
  ConstMatrix gate;  // [rows, channels]
  ConstMatrix up;    // [rows, channels]
  Matrix out;        // [rows, channels]
};

// Consecutive rows that keep the same channels: the first `channels` of gate and up, and of their
// own `down`, whose rows and bias may make up for what left.
struct MlpStep {
  int rows = 0;
  int channels = 0;              // for integers whole groups of kQuantGroup, or all of gate's rows
  const Weight* down = nullptr;  // kInputRows [at least channels, hidden]
  // [channels]: the row of `down` that each channel meets; empty: its own number. So that rows
  // which keep all, and meet `down` as loaded, can share gate and up in the order of a ranking.
  std::span<const int32_t> places = {};
  // [hidden], added to what `down` gives, of any channels; empty: none.
  std::span<const float> bias = {};
};

// out += down(silu(gate(x)) * up(x)), each step over its channels: MatMul, SwiGlu and MatMul to the
// bit, but what lies between them need not be written to memory. Whether it is depends on the
// weights: but for keep_hidden the rooms' contents are undefined afterwards. Gate and up are
// computed once for all steps; channel c for the rows up to the last step that keeps it, so steps
// in order of falling counts cost the area under their staircase.
struct GatedMlpArgs {
  ConstMatrix x;                   // [rows, hidden]
  const Weight& gate;              // kOutputRows [at least the most channels, hidden]
  const Weight& up;                // kOutputRows, as gate
  std::span<const MlpStep> steps;  // their rows add up to x.rows
  Matrix gate_room;                // [rows, the most channels of a step]
  Matrix up_room;                  // [rows, the most channels of a step]
  Matrix out;                      // [rows, hidden]
  // Then up_room holds silu(gate) * up of each row's kept channels, in the order of gate's rows:
  // what rankings and second moments are made of.
  bool keep_hidden = false;
};

// Rotates q and k in place by their positions and writes k and v to the sequences' pages.
// K and V are always complete: no rung narrows them. Both may have no columns: q alone is rotated.
struct RopeAndStoreArgs {
  std::span<const AttentionSpan> spans;
  std::span<const std::span<const int32_t>> page_tables;  // [spans][pages]: this layer's pages
  Matrix q;                                               // [rows, kept heads * head_dim]
  Matrix k;                                               // [rows, kv_heads * head_dim]
  ConstMatrix v;                                          // [rows, kv_heads * head_dim]
  std::span<const float> inverse_frequency;               // [head_dim / 2], radians per position
  RopePairing pairing = RopePairing::kInterleaved;
  // [kv_heads * head_dim], left out of the rotated keys of int4 pages, or empty. What all keys of a
  // head share moves all its scores alike, which a softmax does not see, but takes bits.
  std::span<const float> key_mean = {};
  KvPool* pool = nullptr;
};

// Two int8 pages of one layer and sequence, in order, that become one int4 page.
struct KvPacking {
  int32_t first = 0;
  int32_t second = -1;  // -1: there is none
  int32_t to = 0;       // `first`, `second` or another
};
struct PackKvArgs {
  std::span<const KvPacking> packings;   // done in order
  std::span<const float> key_mean = {};  // as RopeAndStoreArgs
  KvPool* pool = nullptr;
};

// Causal attention of each row over its sequence's pages, online softmax in fp32, pages in order.
// Query head h (in the full numbering) reads KV head h / (heads / kv_heads).
struct AttentionArgs {
  std::span<const AttentionSpan> spans;
  std::span<const std::span<const int32_t>> page_tables;  // [spans][pages]
  ConstMatrix q;                        // [rows, heads_kept.size() * head_dim], rotated
  std::span<const int32_t> heads_kept;  // the query head of each slot of q, none twice
  int heads = 0;                        // full number of query heads
  float scale = 0;                      // usually 1 / sqrt(head_dim)
  const KvPool* pool = nullptr;
  Matrix out;  // [rows, heads_kept.size() * head_dim]
};

// Per row of logits: the largest value, where it is (the lowest index wins a tie), and
// log(sum(exp(logits))) in fp32. What greedy choice and log-probabilities need.
struct LogitStatsArgs {
  struct Stats {
    float max = 0;
    int32_t argmax = 0;
    float log_sum_exp = 0;
  };
  ConstMatrix logits;    // [rows, vocabulary]
  std::span<Stats> out;  // [rows]
};

class Backend {
 public:
  virtual ~Backend() = default;

  // One sentence for start-up: device, instruction set or architecture, threads, and why this one.
  virtual std::string Describe() const = 0;

  // Bytes of scratch held for the ops, which grows with the largest call seen; for the ledger.
  virtual uint64_t workspace_bytes() const = 0;

  // Packs and, for integers, quantises a matrix. Values that come as floats are looked at for 2:4;
  // whether it is then kept compressed is the device's business.
  virtual absl::StatusOr<Weight> UploadWeight(WeightType type, WeightLayout layout, int rows,
                                              int cols, const WeightSource& source) = 0;

  // A panel: the listed rows, each in [0, weight.rows), gathered in the order listed into a weight
  // of their own, in the memory of *panel where that suffices and is nobody else's. kOutputRows and
  // floats keep their type and their values bit for bit. Integers of kInputRows meet others than
  // they shared a scale with: they become int8, within 1/380 of their output's range of what they
  // were. After an error *panel is as it was.
  virtual absl::Status GatherRows(const Weight& weight, std::span<const int32_t> rows,
                                  Weight* panel) = 0;

  // Gives what lies behind a weight back to the device: `releasable` bytes of it. No op may meet it
  // until RefillWeight, or GatherRows for a panel, which find its memory where it was.
  virtual void ReleaseWeight(Weight* weight) = 0;

  // Packs a released weight's values anew, as UploadWeight did. After an error it is released
  // still.
  virtual absl::Status RefillWeight(const WeightSource& source, Weight* weight) = 0;

  // ResourceExhausted, with the bytes asked for, if the device cannot hold it.
  virtual absl::StatusOr<KvPool> CreateKvPool(const KvPoolShape& shape) = 0;

  // Copies each page `from` to its `to`, then gives the memory of all pages from `pages` on back to
  // the device. They may be written to again; what they held is gone.
  virtual void FitKvPool(std::span<const std::pair<int32_t, int32_t>> moves, int pages,
                         KvPool* pool) = 0;

  virtual void Embed(const EmbedArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void MatMul(const MatMulArgs& args) = 0;
  virtual void SwiGlu(const SwiGluArgs& args) = 0;
  virtual void GatedMlp(const GatedMlpArgs& args) = 0;
  virtual void RopeAndStore(const RopeAndStoreArgs& args) = 0;
  virtual void PackKv(const PackKvArgs& args) = 0;
  virtual void Attention(const AttentionArgs& args) = 0;
  virtual void LogitStats(const LogitStatsArgs& args) = 0;

  // Waits for everything enqueued. An error means the device is lost.
  virtual absl::Status Synchronize() = 0;

  // Runs fn(0) .. fn(count - 1) on the host's workers and waits; for host work between ops, such as
  // sampling rows. fn must not call the backend.
  virtual void ParallelFor(int count, const std::function<void(int)>& fn) = 0;
};

}  // namespace espalier
