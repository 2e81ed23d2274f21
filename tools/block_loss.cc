#include "tools/block_loss.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <utility>

#include "engine/machine_memory.h"
#include "tools/forced_run.h"
#include "tools/interrupt.h"

namespace espalier {
namespace {

// Of blocks that are removed of a layer: bit 0 attention, bit 1 the MLP.
int KindsOf(int layer, const BlockSet& removed) {
  return (removed[AttentionBlock(layer)] ? 1 : 0) + (removed[MlpBlock(layer)] ? 2 : 0);
}

constexpr int kBoth = 3;

// Every second row predicts: of a model of 135M with a vocabulary of 49k the head is a fifth of the
// work, and half of it where a change of the last layers is measured.
constexpr int kPredictingEvery = 2;

}  // namespace

BlockLossTable::BlockLossTable(ModelExecutor* executor, std::vector<std::vector<int32_t>> windows,
                               int step_rows, std::string path)
    : executor_(executor),
      windows_(std::move(windows)),
      step_rows_(step_rows),
      path_(std::move(path)) {
  const int layers = executor_->config().layers;
  int32_t page = 0;
  const size_t pages = (windows_.front().size() + kPageTokens - 1) / kPageTokens;
  for (size_t i = 0; i < WindowsAStep(); ++i) {
    std::vector<int32_t> table;
    for (size_t p = 0; p < pages; ++p) table.push_back(page++);
    tables_.emplace_back(layers, table);  // a layer at a time needs one layer's pages
  }
}

size_t BlockLossTable::WindowsAStep() const {
  return std::max<size_t>(1, static_cast<size_t>(step_rows_) / windows_.front().size());
}

std::string BlockLossTable::Stamp() const {
  std::string of = fmt::format("{} {} {} ", executor_->config().name, executor_->weight_types(),
                               KvTypeName(executor_->kv_type()));
  for (const std::vector<int32_t>& window : windows_) {
    of.append(reinterpret_cast<const char*>(window.data()), window.size() * sizeof(int32_t));
  }
  return fmt::format("espalier-block-losses 1 {:016x}", std::hash<std::string>()(of));
}

absl::Status BlockLossTable::Open() {
  const ModelConfig& config = executor_->config();
  const size_t floats = static_cast<size_t>(tokens()) * config.hidden;
  const uint64_t bytes = sizeof(float) * floats * (config.layers + 1);
  const uint64_t available = ReadMachineMemory().available;
  if (bytes > available) {
    return absl::ResourceExhaustedError(
        fmt::format("what comes to each layer of {} tokens takes {} MiB, {} MiB are available",
                    tokens(), bytes >> 20, available >> 20));
  }
  streams_.assign(config.layers + 1, std::vector<float>(floats));
  if (path_.empty()) return absl::OkStatus();
  std::ifstream file(path_);
  std::string line;
  if (std::getline(file, line) && line == Stamp()) {
    std::string blocks;
    double loss = 0;
    // A last line that was cut has too few digits of its set.
    while (file >> blocks >> loss) {
      if (blocks.size() != kMostBlocks || !std::isfinite(loss)) break;
      losses_.emplace(BlockSet(blocks, 0, blocks.npos, '.', 'x'), loss);
    }
  } else {
    std::ofstream(path_) << Stamp() << "\n";
  }
  return std::ofstream(path_, std::ios::app)
             ? absl::OkStatus()
             : absl::UnavailableError(fmt::format("{}: cannot be written", path_));
}

std::optional<double> BlockLossTable::Loss(const BlockSet& removed) {
  if (const auto found = losses_.find(removed); found != losses_.end()) return found->second;
  if (Interrupt::raised()) status_ = absl::CancelledError("interrupted");
  double loss = 0;
  if (status_.ok()) status_ = Measure(removed, &loss);
  if (!status_.ok()) return std::nullopt;
  // As a file tells it again, so that a run that goes on does what one run would have done.
  const std::string told = fmt::format("{:.9g}", loss);
  loss = std::stod(told);
  losses_.emplace(removed, loss);
  ++measured_;
  if (!path_.empty()) {
    std::ofstream(path_, std::ios::app) << removed.to_string('.', 'x') << " " << told << "\n";
  }
  return loss;
}

void BlockLossTable::MakeBatch(size_t window, Batch* batch) const {
  batch->Clear();
  for (size_t i = 0; i < WindowsAStep() && window + i < windows_.size(); ++i) {
    const std::vector<int32_t>& tokens = windows_[window + i];
    AddForcedRows({.tokens = tokens, .rung = 1}, static_cast<int>(i), 0,
                  static_cast<int>(tokens.size()), /*decode=*/false, /*scored=*/true, tables_[i],
                  batch);
  }
  std::erase_if(batch->logits,
                [](const LogitRow& logit) { return logit.row % kPredictingEvery == 0; });
}

absl::Status BlockLossTable::SetDropped(int layer, const BlockSet& removed) {
  const int kinds = KindsOf(layer, removed);
  if (kinds == dropped_kinds_) return absl::OkStatus();
  const SiteWidths widths = executor_->config().sites();
  KeepProfile keep = KeepProfile::Dense(widths);
  for (int l = 0; l < widths.layers; ++l) {
    if (kinds & 1) keep.Keep(l, SiteKind::kHeads, 0);
    if (kinds & 2) keep.Keep(l, SiteKind::kChannels, 0);
  }
  Ladder ladder = Ladder::DenseOnly(widths);
  ladder.Append({.prefill = keep, .decode = keep});
  dropped_kinds_ = kinds;
  return executor_->SetLadder(std::move(ladder), StaticSelector(widths));
}

absl::Status BlockLossTable::RunLayers(int first, const BlockSet& removed) {
  const int layers = executor_->config().layers, hidden = executor_->config().hidden;
  const size_t row_floats = windows_.front().size() * hidden;
  Batch batch;
  for (int layer = first; layer < layers; ++layer) {
    if (Interrupt::raised()) return absl::CancelledError("interrupted");
    std::vector<float>& out = streams_[layer + 1];
    out = streams_[layer];
    // Layer 0 embeds, whatever is left of it.
    if (layer > 0 && KindsOf(layer, removed) == kBoth) continue;
    if (absl::Status status = SetDropped(layer, removed); !status.ok()) return status;
    for (size_t window = 0; window < windows_.size(); window += WindowsAStep()) {
      MakeBatch(window, &batch);
      const absl::Status status = executor_->ExecuteLayer(
          batch, layer, Matrix(out.data() + window * row_floats, batch.rows(), hidden));
      if (!status.ok()) return status;
    }
    known_layers_ = layer + 1;
  }
  known_layers_ = layers;
  return absl::OkStatus();
}

absl::Status BlockLossTable::Measure(const BlockSet& removed, double* loss) {
  const int layers = executor_->config().layers, hidden = executor_->config().hidden;
  int first = 0;
  while (first < known_layers_ && KindsOf(first, removed) == KindsOf(first, on_path_)) ++first;
  known_layers_ = first;
  on_path_ = removed;
  dropped_kinds_ = -1;  // whoever else uses the executor may have set another ladder
  if (absl::Status status = RunLayers(first, removed); !status.ok()) return status;
  Batch batch;
  StepResult result;
  double sum = 0;
  int64_t terms = 0;
  for (size_t window = 0; window < windows_.size(); window += WindowsAStep()) {
    MakeBatch(window, &batch);
    const size_t offset = window * windows_.front().size() * hidden;
    const absl::Status status = executor_->ExecuteHead(
        batch, ConstMatrix(streams_[layers].data() + offset, batch.rows(), hidden), &result);
    if (!status.ok()) return status;
    for (const TokenResult& token : result.tokens) sum -= token.logprob;
    terms += static_cast<int64_t>(result.tokens.size());
  }
  *loss = sum / static_cast<double>(terms);
  return absl::OkStatus();
}

std::vector<double> BlockLossTable::LayerInfluence() {
  double loss = 0;
  known_layers_ = 0;  // what the file knew was never run
  if (status_.ok()) status_ = Measure({}, &loss);
  if (!status_.ok()) return {};
  const int hidden = executor_->config().hidden;
  std::vector<double> influence;
  // What comes to layer 0 is not in the streams, since it embeds by itself: nothing is more
  // influential.
  influence.push_back(1);
  for (size_t layer = 1; layer + 1 < streams_.size(); ++layer) {
    double sum = 0;
    for (int64_t token = 0; token < tokens(); ++token) {
      const float* const in = streams_[layer].data() + token * hidden;
      const float* const out = streams_[layer + 1].data() + token * hidden;
      double dot = 0, in2 = 0, out2 = 0;
      for (int i = 0; i < hidden; ++i) {
        dot += double{in[i]} * out[i];
        in2 += double{in[i]} * in[i];
        out2 += double{out[i]} * out[i];
      }
      sum += 1 - dot / std::sqrt(in2 * out2);
    }
    influence.push_back(sum / static_cast<double>(tokens()));
  }
  return influence;
}

}  // namespace espalier
