// One step's work as flat arrays, made by the Scheduler, and what came of it, made by an Executor.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "engine/scheduling/request.h"

namespace espalier {

// The rows of one sequence in this step: a prefill chunk or a single decode row.
struct BatchSpan {
  RequestId id = 0;
  int first_row = 0;
  int rows = 0;
  int start = 0;  // position of first_row = tokens whose K and V the pages hold already
  bool decode = false;
  bool admitted = false;  // its first rows since admission: others computed what lies before them
  int rung = 0;           // index into the ladder
  // Page tables, one per layer: page_tables[layer][i] holds positions [n i, n i + n) of n a page,
  // 16, or 32 where the rung keeps K and V in four bits. Long
  // enough for this step's rows; empty where the rung drops the attention block. Valid until
  // Commit.
  std::span<const std::vector<int32_t>> page_tables;
};

// Two pages of a layer, in order, that become one of four bits.
struct PagePacking {
  int layer = 0;
  int32_t first = 0;
  int32_t second = -1;  // -1: nothing that was computed lies there
  int32_t to = 0;       // `first`, `second` or another
};

// A row whose logits are wanted.
struct LogitRow {
  enum class Use : uint8_t {
    kSample,  // draw the sequence's next token
    kScore,   // log-probability of `target`, the prompt's next token
  };
  int row = 0;
  int span = 0;  // index into Batch::spans
  Use use = Use::kSample;
  int32_t target = -1;  // kScore only
  // Pointers and spans are valid until Commit.
  const SamplingParams* sampling = nullptr;  // kScore: only top_logprobs is read
  std::span<const int32_t> tokens;           // prompt and output so far
  int prompt_tokens = 0;                     // tokens[0, prompt_tokens) are the prompt
  std::span<const int32_t> banned;           // stop tokens while below min_tokens, else empty
};

struct Batch {
  std::vector<int32_t> tokens;   // [rows]
  std::vector<BatchSpan> spans;  // decode spans first, then prefill chunks, rows consecutive
  std::vector<LogitRow> logits;  // ascending rows
  int decode_rows = 0;
  int prefill_rows = 0;

  int rows() const { return static_cast<int>(tokens.size()); }
  bool empty() const { return tokens.empty(); }
  void Clear();
};

// One drawn or scored token.
struct TokenResult {
  int32_t token = -1;  // drawn token, or the target
  float logprob = 0;  // natural log, of the model's own distribution (before temperature, penalties
                      // and bias); meaningful if log-probabilities were asked for
  std::vector<std::pair<int32_t, float>> top;  // the most likely (token, logprob), descending
};

// Where a step's time went, seconds.
struct PhaseTimes {
  double embed = 0;
  double attention_projections = 0;  // q, k, v, o
  double attention = 0;              // RoPE, KV write, attention
  double probe = 0;                  // probe rows, and the ranking by them or by history
  double gather = 0;                 // panels by a new ranking
  double mlp = 0;
  double norm = 0;
  double head = 0;
  double sampling = 0;

  PhaseTimes& operator+=(const PhaseTimes& other) {
    embed += other.embed;
    attention_projections += other.attention_projections;
    attention += other.attention;
    probe += other.probe;
    gather += other.gather;
    mlp += other.mlp;
    norm += other.norm;
    head += other.head;
    sampling += other.sampling;
    return *this;
  }
};

// What looking ahead and back for heads and channels to keep took, and how old the rankings are.
struct ProbeUse {
  bool ahead = false;    // narrowed prefill rows were ranked by a probe of their own step
  bool whole = false;    // rows kept all of what they narrow, for once
  int64_t rows = 0;      // probed, summed over layers' sites
  int64_t rankings = 0;  // renewed, of a layer's heads or channels each
  int64_t age = 0;       // steps with narrowed rows since the last was
};

// Rows by how the channels that they keep were chosen.
struct StageRows {
  int64_t full = 0;     // all are kept
  int64_t probed = 0;   // by a probe of their own step
  int64_t history = 0;  // before their step: by calibration, by earlier probes or by history

  StageRows& operator+=(const StageRows& other) {
    full += other.full;
    probed += other.probed;
    history += other.history;
    return *this;
  }
  bool operator==(const StageRows&) const = default;
};

struct StepResult {
  std::vector<TokenResult> tokens;  // one per Batch::logits, same order
  PhaseTimes phases;
  ProbeUse probe;
};

}  // namespace espalier
