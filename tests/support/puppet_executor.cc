#include "tests/support/puppet_executor.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace espalier {
namespace {

// The finaliser of splitmix64: every input bit reaches every output bit.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t Mix(uint64_t a, uint64_t b) { return Mix(Mix(a + 0x9e3779b97f4a7c15u) + b); }

template <typename... Args>
absl::Status Fault(fmt::format_string<Args...> message, Args&&... args) {
  return absl::InternalError(fmt::format(message, std::forward<Args>(args)...));
}

}  // namespace

PuppetExecutor::PuppetExecutor(const KvGeometry& geometry, const Ladder& ladder)
    : geometry_(geometry),
      ladder_(ladder),
      memory_(static_cast<size_t>(geometry.pages) * most_tokens()),
      read_step_(geometry.pages, -1),
      write_step_(geometry.pages, -1) {}

absl::Status PuppetExecutor::Execute(const Batch& batch, StepResult* result) {
  if (fail_from_ >= 0 && steps_ >= fail_from_) return absl::UnavailableError("told to fail");
  for (const auto check : {&PuppetExecutor::CheckShape, &PuppetExecutor::CheckPages,
                           &PuppetExecutor::WriteAndRead, &PuppetExecutor::CheckLogits}) {
    if (absl::Status status = (this->*check)(batch); !status.ok()) return status;
  }
  Digest(batch);
  result->tokens.resize(batch.logits.size());
  for (size_t i = 0; i < batch.logits.size(); ++i) {
    const LogitRow& row = batch.logits[i];
    const BatchSpan& span = batch.spans[row.span];
    const int position = span.start + row.row - span.first_row + 1;
    const int32_t token = row.use == LogitRow::Use::kScore
                              ? row.target
                              : Draw(span.id, position - row.prompt_tokens, row.banned);
    result->tokens[i] = {.token = token, .logprob = Logprob(span.id, position)};
  }
  ++steps_;
  return absl::OkStatus();
}

void PuppetExecutor::PackPages(std::span<const PagePacking> packings) {
  const auto at = [&](int64_t page) { return memory_.begin() + page * most_tokens(); };
  for (const PagePacking& packing : packings) {
    std::vector<Slot> packed(most_tokens());
    std::copy_n(at(packing.first), geometry_.page_tokens, packed.begin());
    if (packing.second >= 0) {
      std::copy_n(at(packing.second), geometry_.page_tokens,
                  packed.begin() + geometry_.page_tokens);
    }
    std::ranges::copy(packed, at(packing.to));
  }
  packings_ += static_cast<int>(packings.size());
}

void PuppetExecutor::FitPages(std::span<const std::pair<int32_t, int32_t>> moves, int pages) {
  const auto at = [&](int64_t page) { return memory_.begin() + page * most_tokens(); };
  for (const auto& [from, to] : moves) std::copy_n(at(from), most_tokens(), at(to));
  std::fill(at(pages), memory_.end(), Slot{});
}

std::vector<int32_t> PuppetExecutor::Answer(const Request& request) const {
  const StopParams& stop = request.stop;
  std::vector<int32_t> answer;
  while (static_cast<int>(answer.size()) < stop.max_tokens) {
    const int index = static_cast<int>(answer.size());
    const bool may_stop = index >= stop.min_tokens;
    const int32_t token =
        Draw(request.id, index,
             may_stop ? std::span<const int32_t>() : std::span<const int32_t>(stop.stop_tokens));
    if (may_stop && std::ranges::count(stop.stop_tokens, token) > 0) break;
    answer.push_back(token);
  }
  return answer;
}

float PuppetExecutor::Logprob(RequestId id, int position) {
  return -static_cast<float>(Mix(~id, static_cast<uint64_t>(position)) % 8000 + 1) / 1000.0f;
}

int32_t PuppetExecutor::Draw(RequestId id, int index, std::span<const int32_t> banned) const {
  const auto told = told_.find(id);
  int32_t token = told != told_.end() && index < static_cast<int>(told->second.size())
                      ? told->second[index]
                      : static_cast<int32_t>(Mix(id, static_cast<uint64_t>(index)) % kVocabulary);
  while (std::ranges::count(banned, token) > 0) token = (token + 1) % kVocabulary;
  return token;
}

uint64_t PuppetExecutor::History(uint64_t before, int32_t token, int how) {
  return Mix(before, static_cast<uint64_t>(token) << 32 | static_cast<uint64_t>(how));
}

int PuppetExecutor::How(const BatchSpan& span) const {
  const Rung& rung = ladder_.rung(span.rung);
  return 2 * span.rung + (span.decode && !(rung.prefill == rung.decode) ? 1 : 0);
}

PuppetExecutor::Slot& PuppetExecutor::SlotOf(const BatchSpan& span, int layer, int position) {
  const int32_t page = span.page_tables[layer][position / page_tokens(span)];
  return memory_[static_cast<size_t>(page) * most_tokens() + position % page_tokens(span)];
}

// Spans lie one after the other over all rows, decode spans first, no sequence twice.
absl::Status PuppetExecutor::CheckShape(const Batch& batch) {
  if (batch.empty()) return Fault("an empty batch is nothing to execute");
  int rows = 0;
  int decode_rows = 0;
  std::vector<RequestId> ids;
  for (const BatchSpan& span : batch.spans) {
    if (span.first_row != rows || span.rows < 1 || span.start < 0) {
      return Fault("request {}: rows [{}, +{}) at position {} after {} rows", span.id,
                   span.first_row, span.rows, span.start, rows);
    }
    if (span.decode && (span.rows != 1 || decode_rows != rows)) {
      return Fault("request {}: a decode span of {} rows after {} prefill rows", span.id, span.rows,
                   rows - decode_rows);
    }
    if (span.rung < 0 || span.rung >= ladder_.size()) {
      return Fault("request {}: rung {} of {}", span.id, span.rung, ladder_.size());
    }
    rows += span.rows;
    decode_rows += span.decode ? 1 : 0;
    ids.push_back(span.id);
  }
  std::ranges::sort(ids);
  if (std::ranges::adjacent_find(ids) != ids.end()) return Fault("a request has two spans");
  if (rows != batch.rows() || decode_rows != batch.decode_rows ||
      rows - decode_rows != batch.prefill_rows) {
    return Fault("{} rows in spans, {} of them decode; the batch says {} and {} + {}", rows,
                 decode_rows, batch.rows(), batch.decode_rows, batch.prefill_rows);
  }
  return absl::OkStatus();
}

// Tables are long enough where the rung keeps K and V, empty elsewhere, and who writes to a page
// has it alone.
absl::Status PuppetExecutor::CheckPages(const Batch& batch) {
  for (const BatchSpan& span : batch.spans) {
    if (static_cast<int>(span.page_tables.size()) != geometry_.layers) {
      return Fault("request {}: {} page tables", span.id, span.page_tables.size());
    }
    for (int layer = 0; layer < geometry_.layers; ++layer) {
      const std::vector<int32_t>& table = span.page_tables[layer];
      const bool holds = ladder_.rung(span.rung).HoldsKv(layer);
      const int64_t room = static_cast<int64_t>(table.size()) * page_tokens(span);
      if (holds ? room < span.start + span.rows : room > 0) {
        return Fault("request {}: room for {} tokens in layer {}, wanted {}", span.id, room, layer,
                     holds ? span.start + span.rows : 0);
      }
      for (int i = 0; i < static_cast<int>(table.size()); ++i) {
        const int32_t page = table[i];
        if (page < 0 || page >= geometry_.pages) return Fault("page {} does not exist", page);
        const bool writes = (i + 1) * page_tokens(span) > span.start;
        if (write_step_[page] == steps_ || (writes && read_step_[page] == steps_)) {
          return Fault("request {}: page {} is written while another has it", span.id, page);
        }
        read_step_[page] = steps_;
        if (writes) write_step_[page] = steps_;
      }
    }
  }
  return absl::OkStatus();
}

// All rows write their K and V; then each reads every position up to itself. Whether it is its own
// text that it reads is told by the spans with a logit row, which have all of it: CheckLogits.
absl::Status PuppetExecutor::WriteAndRead(const Batch& batch) {
  for (const BatchSpan& span : batch.spans) {
    std::vector<int>& how = how_[span.id];
    if (span.admitted) how.assign(span.start, 2 * span.rung);
    how.resize(span.start);
    how.resize(span.start + span.rows, How(span));
    for (int layer = 0; layer < geometry_.layers; ++layer) {
      if (span.page_tables[layer].empty()) continue;
      for (int i = 0; i < span.rows; ++i) {
        const int position = span.start + i;
        const uint64_t before = position == 0 ? 0 : SlotOf(span, layer, position - 1).history;
        SlotOf(span, layer, position) = {
            .layer = layer,
            .position = position,
            .history = History(before, batch.tokens[span.first_row + i], How(span))};
      }
    }
  }
  for (const BatchSpan& span : batch.spans) {
    for (int layer = 0; layer < geometry_.layers; ++layer) {
      if (span.page_tables[layer].empty()) continue;
      for (int position = 0; position < span.start + span.rows; ++position) {
        const Slot& slot = SlotOf(span, layer, position);
        if (slot.layer != layer || slot.position != position) {
          return Fault("request {} reads layer {} position {}, finds layer {} position {}", span.id,
                       layer, position, slot.layer, slot.position);
        }
      }
    }
  }
  return absl::OkStatus();
}

// Rows ascend within their spans, and what was computed so far is the sequence's own text.
absl::Status PuppetExecutor::CheckLogits(const Batch& batch) {
  int last_row = -1;
  for (const LogitRow& row : batch.logits) {
    if (row.row <= std::exchange(last_row, row.row) || row.span < 0 ||
        row.span >= static_cast<int>(batch.spans.size())) {
      return Fault("logit row {} of span {} is out of order", row.row, row.span);
    }
    const BatchSpan& span = batch.spans[row.span];
    const int offset = row.row - span.first_row;
    const int size = span.start + offset + 1;  // tokens that the row has seen
    if (offset < 0 || offset >= span.rows || row.sampling == nullptr ||
        size > static_cast<int>(row.tokens.size())) {
      return Fault("request {}: logit row {} outside of its span", span.id, row.row);
    }
    const bool sample = row.use == LogitRow::Use::kSample;
    if (sample ? size != static_cast<int>(row.tokens.size())
               : size >= row.prompt_tokens || row.target != row.tokens[size]) {
      return Fault("request {}: {} at {} of {} tokens", span.id, sample ? "sample" : "score", size,
                   row.tokens.size());
    }
    const std::vector<int>& how = how_.at(span.id);
    for (int layer = 0; layer < geometry_.layers; ++layer) {
      if (span.page_tables[layer].empty()) continue;
      uint64_t history = 0;
      for (int position = 0; position < size; ++position) {
        history = History(history, row.tokens[position], how[position]);
        if (SlotOf(span, layer, position).history != history) {
          return Fault("request {}: layer {} position {} holds another text's", span.id, layer,
                       position);
        }
      }
    }
  }
  return absl::OkStatus();
}

void PuppetExecutor::Digest(const Batch& batch) {
  const auto add = [this](auto value) { digest_ = Mix(digest_, static_cast<uint64_t>(value)); };
  for (const int32_t token : batch.tokens) add(token);
  for (const BatchSpan& span : batch.spans) {
    for (const uint64_t field :
         {span.id, uint64_t(span.first_row), uint64_t(span.rows), uint64_t(span.start),
          uint64_t(span.decode), uint64_t(span.rung)}) {
      add(field);
    }
    for (const std::vector<int32_t>& table : span.page_tables) {
      for (const int32_t page : table) add(page);
    }
  }
  for (const LogitRow& row : batch.logits) {
    for (const int field : {row.row, row.span, int(row.use), int(row.target), row.prompt_tokens,
                            int(row.tokens.size()), int(row.banned.size())}) {
      add(field);
    }
  }
}

}  // namespace espalier
