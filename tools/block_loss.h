// What a model loses without some of its blocks, measured on texts that stay the same, each set of
// blocks once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/model_executor.h"
#include "policy/blocks/block_memory.h"

namespace espalier {

class BlockLossTable {
 public:
  // `windows`, all of one length, are tokens to predict. What is measured is added to the file
  // `path`, and what it has of the same model and windows is not measured again; empty: no file.
  // `executor` must hold a step of `step_rows` rows in its pool, and must outlive the table, which
  // sets its ladder.
  BlockLossTable(ModelExecutor* executor, std::vector<std::vector<int32_t>> windows, int step_rows,
                 std::string path);

  // Makes room for what comes to each layer, and opens the file; errors name it. Call it first.
  absl::Status Open();

  // Nats per token without these blocks, of every second token. None once Interrupt was raised or
  // the device failed, which status() then tells.
  std::optional<double> Loss(const BlockSet& removed);
  const absl::Status& status() const { return status_; }

  int64_t tokens() const { return static_cast<int64_t>(windows_.size() * windows_.front().size()); }
  int64_t measured() const { return measured_; }  // in this process
  int64_t known() const { return static_cast<int64_t>(losses_.size()); }

  // [layers]: 1 - cos(what comes to a layer, what leaves it), mean over all tokens, in the whole
  // model: ShortGPT's block influence (arXiv 2403.03853). Empty on error.
  std::vector<double> LayerInfluence();

 private:
  absl::Status Measure(const BlockSet& removed, double* loss);
  // Runs layers from `first` on without the blocks; streams_ has what comes to each.
  absl::Status RunLayers(int first, const BlockSet& removed);
  absl::Status SetDropped(int layer, const BlockSet& removed);
  void MakeBatch(size_t window, Batch* batch) const;
  size_t WindowsAStep() const;
  std::string Stamp() const;

  ModelExecutor* const executor_;
  const std::vector<std::vector<int32_t>> windows_;
  const int step_rows_;
  const std::string path_;
  std::unordered_map<BlockSet, double> losses_;
  int64_t measured_ = 0;
  absl::Status status_;
  std::vector<std::vector<std::vector<int32_t>>> tables_;  // [windows of a step][layers]
  // [layers + 1][tokens, hidden]: what comes to a layer without on_path_'s blocks below it; what
  // differs first from there on is run anew.
  std::vector<std::vector<float>> streams_;
  BlockSet on_path_;
  int known_layers_ = 0;    // streams_ up to this one are those of on_path_
  int dropped_kinds_ = -1;  // of the ladder that is set
};

}  // namespace espalier
