// Runs a model's forward pass without a scheduler: whole prompts, chosen chunks, all logits.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/model/decoder.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {

class ForwardHarness {
 public:
  struct Options {
    std::optional<Isa> isa;
    WeightPlan weights = WeightPlan::kF32;
    KvType kv = KvType::kF32;
    int max_rows = 1024;  // longest sequence and widest step
    int sequences = 1;    // that may live side by side
    int threads = 0;
  };

  // Crashes with the status on a bad file: a test has no use for the rest.
  ForwardHarness(const std::string& path, const Options& options);

  // A stretch of one sequence in a step; what is before `start` was computed in earlier steps.
  struct Chunk {
    int sequence = 0;
    int start = 0;
    std::span<const int32_t> ids;
    int rung = 0;
    bool decode = false;  // narrowed as decode rows
  };

  // One forward step over all chunks, in the order of their rungs; logits of every row, [rows,
  // vocabulary].
  std::vector<float> Step(std::span<const Chunk> chunks);

  // Logits at every position, [ids, vocabulary], the prompt computed in steps of `chunk` rows.
  std::vector<float> Logits(std::span<const int32_t> ids, int chunk = 1024, int rung = 0);

  // Negative log-likelihood of ids[1..] given what is before each, nats, summed in double.
  double NegativeLogLikelihood(std::span<const int32_t> ids);

  const ModelFile& file() const { return *file_; }
  Decoder& decoder() { return *decoder_; }
  Activations& activations() { return activations_; }
  StaticSelector& selector() { return selector_; }
  const Ladder& ladder() const { return ladder_; }

  // The rungs that chunks may be on, 0 dense, with panels by the selector's rankings as they are.
  void SetLadder(Ladder ladder);

 private:
  // One step; calls visit(first row, logits [rows, vocabulary]) in turns.
  void Run(std::span<const Chunk> chunks,
           const std::function<void(int row, ConstMatrix logits)>& visit);

  int max_rows_;
  std::unique_ptr<ModelFile> file_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Decoder> decoder_;
  StaticSelector selector_;
  Ladder ladder_;
  Activations activations_;
  KvPool pool_;
  std::vector<std::vector<int32_t>> pages_;  // [layers * sequences], layer-major
};

}  // namespace espalier
