#include "tools/forced_run.h"

#include <algorithm>
#include <chrono>

namespace espalier {
namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

void AddForcedRows(const ForcedText& text, int index, int start, int rows, bool decode, bool scored,
                   std::span<const std::vector<int32_t>> tables, Batch* batch) {
  static const SamplingParams kNoCandidates{.top_logprobs = 0};
  const int first = batch->rows(), span = static_cast<int>(batch->spans.size());
  batch->spans.push_back({.id = static_cast<RequestId>(index + 1),
                          .first_row = first,
                          .rows = rows,
                          .start = start,
                          .decode = decode,
                          .rung = text.rung,
                          .page_tables = tables});
  for (int i = 0; i < rows; ++i) {
    const size_t at = start + i;
    batch->tokens.push_back(text.tokens[at]);
    if (!scored || at + 1 >= text.tokens.size()) continue;
    batch->logits.push_back({.row = first + i,
                             .span = span,
                             .use = LogitRow::Use::kScore,
                             .target = text.tokens[at + 1],
                             .sampling = &kNoCandidates,
                             .tokens = text.tokens.first(at + 1),
                             .prompt_tokens = static_cast<int>(at + 1)});
  }
  (decode ? batch->decode_rows : batch->prefill_rows) += rows;
}

absl::StatusOr<ForcedResult> RunForced(ModelExecutor* executor, int step_rows,
                                       std::span<const ForcedText> texts) {
  const int layers = executor->config().layers;
  std::vector<std::vector<std::vector<int32_t>>> tables(texts.size());  // [texts][layers]
  int32_t page = 0;
  size_t longest = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    tables[i].resize(layers);
    longest = std::max(longest, texts[i].tokens.size());
    const size_t pages = (texts[i].tokens.size() + kPageTokens - 1) / kPageTokens;
    for (std::vector<int32_t>& table : tables[i]) {
      for (size_t p = 0; p < pages; ++p) table.push_back(page++);
    }
  }
  if (page > executor->kv_geometry().pages) {
    return absl::ResourceExhaustedError("the KV pool does not hold all texts at once");
  }

  ForcedResult result;
  result.nll.resize(texts.size());
  result.terms.resize(texts.size());
  Batch batch;
  StepResult step;
  const auto run = [&]() -> absl::Status {
    if (batch.empty()) return absl::OkStatus();
    const Clock::time_point begin = Clock::now();
    const absl::Status status = executor->Execute(batch, &step);
    if (!status.ok()) return status;
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    result.probe_s += step.phases.probe;
    (batch.prefill_rows > 0 ? result.prefill_s : result.decode_s) += seconds;
    result.prefill_rows += batch.prefill_rows;
    result.decode_rows += batch.decode_rows;
    for (size_t i = 0; i < batch.logits.size(); ++i) {
      const size_t text = batch.spans[batch.logits[i].span].id - 1;
      result.nll[text] -= step.tokens[i].logprob;
      ++result.terms[text];
    }
    batch.Clear();
    return absl::OkStatus();
  };
  for (size_t i = 0; i < texts.size(); ++i) {
    const bool scored =
        texts[i].scored && texts[i].prompt == static_cast<int>(texts[i].tokens.size());
    for (int start = 0; start < texts[i].prompt;) {
      if (batch.rows() == step_rows) {
        if (const absl::Status status = run(); !status.ok()) return status;
      }
      const int rows = std::min(texts[i].prompt - start, step_rows - batch.rows());
      AddForcedRows(texts[i], static_cast<int>(i), start, rows, /*decode=*/false, scored, tables[i],
                    &batch);
      start += rows;
    }
  }
  if (const absl::Status status = run(); !status.ok()) return status;
  // The last token of a text is predicted and never a row.
  for (size_t at = 0; at + 1 < longest; ++at) {
    for (size_t i = 0; i < texts.size(); ++i) {
      if (at < static_cast<size_t>(texts[i].prompt) || at + 1 >= texts[i].tokens.size()) continue;
      if (batch.rows() == step_rows) {
        if (const absl::Status status = run(); !status.ok()) return status;
      }
      AddForcedRows(texts[i], static_cast<int>(i), static_cast<int>(at), 1, /*decode=*/true,
                    texts[i].scored, tables[i], &batch);
    }
    if (const absl::Status status = run(); !status.ok()) return status;
  }
  return result;
}

}  // namespace espalier
