// Texts forced through the executor as a server runs them: prompts in prefill steps, then a decode
// step for each further token, on any rungs, side by side. What is left out is drawing tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/model_executor.h"

namespace espalier {

struct ForcedText {
  std::span<const int32_t> tokens;  // at least 2
  int prompt = 0;                   // of these, prefilled; all: nothing is decoded
  int rung = 0;
  bool scored = true;  // false: nothing is predicted, which saves the LM head
};

struct ForcedResult {
  // Loss of each text, nats: of the decode rows' predictions, or of all if nothing was decoded.
  std::vector<double> nll;
  std::vector<int> terms;  // predictions it is the sum of
  double prefill_s = 0, decode_s = 0;
  double probe_s = 0;  // of both
  int64_t prefill_rows = 0, decode_rows = 0;
};

// Adds `rows` rows of a text from position `start` on, each of which, if `scored`, predicts the
// next token; in a result they are texts[index]'s, of request index + 1.
void AddForcedRows(const ForcedText& text, int index, int start, int rows, bool decode, bool scored,
                   std::span<const std::vector<int32_t>> tables, Batch* batch);

// All texts at once: the pool must hold them, which is the caller's to see to. Steps have at most
// `step_rows` rows, and decode steps one of each text that is not at its end.
absl::StatusOr<ForcedResult> RunForced(ModelExecutor* executor, int step_rows,
                                       std::span<const ForcedText> texts);

}  // namespace espalier
