#include "tests/engine/model/forward_harness.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace espalier {
namespace {

constexpr int kLogitRows = 64;

template <typename T>
T OrDie(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
    std::abort();
  }
  return *std::move(value);
}

}  // namespace

ForwardHarness::ForwardHarness(const std::string& path, const Options& options)
    : max_rows_(options.max_rows),
      file_(OrDie(ModelFile::Open(path))),
      backend_(OrDie(CreateCpuBackend({.isa = options.isa, .threads = options.threads}))),
      decoder_(OrDie(Decoder::Load(*file_, backend_.get(), options.weights, {}))),
      selector_(file_->config().sites()),
      ladder_(Ladder::DenseOnly(file_->config().sites())),
      activations_(file_->config(), max_rows_) {
  const ModelConfig& config = file_->config();
  const int pages = (max_rows_ + kPageTokens - 1) / kPageTokens;
  const int tables = config.layers * options.sequences;
  pool_ = OrDie(backend_->CreateKvPool({.type = options.kv,
                                        .pages = pages * tables,
                                        .kv_heads = config.kv_heads,
                                        .head_dim = config.head_dim}));
  pages_.resize(tables);
  for (int table = 0; table < tables; ++table) {
    // Scattered on purpose: neighbouring positions do not lie in neighbouring pages.
    for (int i = 0; i < pages; ++i) pages_[table].push_back((pages - 1 - i) * tables + table);
  }
}

void ForwardHarness::Run(std::span<const Chunk> chunks,
                         const std::function<void(int, ConstMatrix)>& visit) {
  const ModelConfig& config = file_->config();
  const int sequences = static_cast<int>(pages_.size()) / config.layers;
  std::vector<int32_t> tokens;
  std::vector<AttentionSpan> spans;
  std::vector<std::span<const int32_t>> tables;
  std::vector<PlanStep> steps;
  for (const Chunk& chunk : chunks) {
    steps.push_back({.rows = static_cast<int>(chunk.ids.size()),
                     .spans = 1,
                     .rung = &ladder_.rung(chunk.rung),
                     .decode = chunk.decode});
    spans.push_back({.first_row = static_cast<int>(tokens.size()),
                     .rows = static_cast<int>(chunk.ids.size()),
                     .start = chunk.start});
    tokens.insert(tokens.end(), chunk.ids.begin(), chunk.ids.end());
  }
  for (int layer = 0; layer < config.layers; ++layer) {
    for (const Chunk& chunk : chunks) tables.push_back(pages_[layer * sequences + chunk.sequence]);
  }
  PhaseTimes phases;
  decoder_->Forward({.tokens = tokens, .spans = spans, .tables = tables, .steps = steps}, &pool_,
                    &activations_, &phases);
  const int count = static_cast<int>(tokens.size());
  std::vector<float> logits(static_cast<size_t>(kLogitRows) * config.vocabulary);
  std::vector<int32_t> rows;
  for (int begin = 0; begin < count; begin += kLogitRows) {
    const int turn = std::min(kLogitRows, count - begin);
    rows.resize(turn);
    for (int i = 0; i < turn; ++i) rows[i] = begin + i;
    const Matrix out(logits.data(), turn, config.vocabulary);
    decoder_->Logits(rows, &activations_, out);
    visit(begin, out);
  }
}

std::vector<float> ForwardHarness::Step(std::span<const Chunk> chunks) {
  const int vocabulary = file_->config().vocabulary;
  std::vector<float> all;
  Run(chunks, [&](int, ConstMatrix logits) {
    all.insert(all.end(), logits.data, logits.data + static_cast<size_t>(logits.rows) * vocabulary);
  });
  return all;
}

void ForwardHarness::SetLadder(Ladder ladder) {
  ladder_ = std::move(ladder);
  const absl::Status status = decoder_->MakePanels(ladder_, selector_);
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::abort();
}

std::vector<float> ForwardHarness::Logits(std::span<const int32_t> ids, int chunk, int rung) {
  std::vector<float> all;
  for (int start = 0; start < static_cast<int>(ids.size()); start += chunk) {
    const Chunk step{.start = start,
                     .ids = ids.subspan(start, std::min<int>(chunk, ids.size() - start)),
                     .rung = rung};
    const std::vector<float> logits = Step(std::span(&step, 1));
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

double ForwardHarness::NegativeLogLikelihood(std::span<const int32_t> ids) {
  double total = 0;
  std::vector<LogitStatsArgs::Stats> stats(kLogitRows);
  const Chunk whole{.ids = ids};
  Run(std::span(&whole, 1), [&](int row, ConstMatrix logits) {
    backend_->LogitStats({.logits = logits, .out = std::span(stats).first(logits.rows)});
    for (int i = 0; i < logits.rows; ++i) {
      const size_t target = row + i + 1;
      if (target < ids.size()) total += stats[i].log_sum_exp - logits.row(i)[ids[target]];
    }
  });
  return total;
}

}  // namespace espalier
