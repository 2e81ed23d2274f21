// The Executor over a real model: weights, KV pool, forward pass and sampling on one backend.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/executor.h"
#include "engine/ledger.h"
#include "engine/model/files/model_file.h"
#include "engine/model/weight_plan.h"
#include "engine/pruning/channel_moments.h"
#include "engine/pruning/channel_selector.h"
#include "engine/pruning/probe.h"
#include "engine/pruning/weights/input_moments.h"
#include "engine/scheduling/scheduler.h"
#include "kernels/backend.h"
#include "policy/blocks/block_memory.h"
#include "policy/ladder.h"

namespace espalier {

struct ModelOptions {
  WeightPlan weights = WeightPlan::kAuto;
  std::optional<KvType> kv;  // none: DefaultKvType
  // Bytes for KV pages, rounded down to whole pages; 0: enough for 32 sequences of 1,024 tokens or
  // one of the model's context, whichever is more, but at most half of the memory available.
  uint64_t kv_bytes = 0;
  int max_batch_tokens = 128;  // rows of a step; sizes the workspace
  int max_logit_rows = 64;     // rows of logits computed at once; more are done in turns
};

struct WeightSources;

class ModelExecutor final : public Executor {
 public:
  // Called with done in [0, total] weights loaded; false: the rest need not be.
  using Progress = std::function<bool(int done, int total)>;

  // Uploads the weights of `file` and makes the KV pool. `file` may be closed afterwards; `backend`
  // must outlive the executor. Errors name file and tensor, or the bytes that do not fit; Cancelled
  // if `progress` says false.
  static absl::StatusOr<std::unique_ptr<ModelExecutor>> Load(const ModelFile& file,
                                                             Backend* backend,
                                                             const ModelOptions& options,
                                                             const Progress& progress = {});
  ~ModelExecutor() override;

  // The rungs that sequences may be on, with panels by the selector's rankings as they are now. Not
  // while any sequence lives: whoever schedules takes ladder() when it starts. InvalidArgument for
  // a ladder of another model, of counts that panels cannot have, or of K and V in four bits where
  // the pool has no int8 or heads are not of 8 to 256 in eights; ResourceExhausted if panels do
  // not fit. Then all is as it was.
  absl::Status SetLadder(Ladder ladder, const ChannelSelector& selector);

  // As Decoder::KeepSources; the channels are those of SetLadder, later ones too.
  void KeepSources(WeightSources sources);

  // As Decoder::set_probe.
  void set_probe(Probe* probe);

  // As Decoder::set_channel_observer. Rows lie in the order of the batch's rungs.
  void set_channel_observer(std::function<void(int layer, ConstMatrix hidden)> observer);

  // As Decoder::set_key_observer.
  void set_key_observer(std::function<void(int layer, ConstMatrix keys)> observer);

  // As Decoder::set_input_observer. Rows lie as above.
  void set_input_observer(std::function<void(int layer, MatrixInput, ConstMatrix rows)> observer);

  // As Decoder::set_before_weights and ReplaceWeight, by the options' plan.
  void set_before_weights(std::function<void(int layer, MatrixInput, ConstMatrix rows)> before);
  absl::Status ReplaceWeight(int layer, std::string_view part, ConstMatrix values);

  // Adds what meets the matrices in one of `every` (>= 1) steps with kGatheredRows or more rows of
  // rung 0 to `moments`, of those rows alone; other steps are as without, and observers of the
  // others above are not set meanwhile. Null, or frozen moments: gathers no more. Must outlive its
  // use.
  void set_input_moments(InputMoments* moments, int every);
  static constexpr int kGatheredRows = 16;
  // Adds what meets `down` in one layer, the one of which `moments` have least, in one of `every`
  // steps with kGatheredRows or more rows of rung 0 that are not at position 0: of those rows, or
  // of ChannelMoments::kMostRows among them, evenly spread. Else as above, and beside it or not.
  // Such a step takes channels * (channels + 64) / 2 multiply-adds a row more, in fp32, and
  // allocates nothing.
  void set_channel_moments(ChannelMoments* moments, int every);

  absl::Status Execute(const Batch& batch, StepResult* result) override;

  void PackPages(std::span<const PagePacking> packings) override;
  void FitPages(std::span<const std::pair<int32_t, int32_t>> moves, int pages) override;
  // 0 too while a source has changed since it was opened.
  int ReleasablePages(RungSet served) const override;
  absl::StatusOr<WeightsFit> FitWeights(RungSet served, bool at_once) override;

  // Runs one layer over the batch's rows: residual [rows, hidden], in the batch's order, is what
  // the layer before left and becomes what this one leaves; what it comes to layer 0 with does not
  // matter, unless `embedded` says that it is what tokens embed to. Its pages keep K and V as in
  // Execute. For calibration, layer by layer.
  absl::Status ExecuteLayer(const Batch& batch, int layer, Matrix residual, bool embedded = false);
  // What Execute does after the last layer, which left `residual`.
  absl::Status ExecuteHead(const Batch& batch, ConstMatrix residual, StepResult* result);

  const ModelConfig& config() const;
  KvGeometry kv_geometry() const;
  KvType kv_type() const;
  const Ladder& ladder() const;

  // Weights, panels among them, in memory and out of it, and workspace, and what the pool is worth
  // with `stats` pages used, cached and free. `foreign` is left zero: who serves knows the machine.
  Ledger ledger(const SchedulerStats& stats) const;
  // What its blocks take, as loaded, and a token's K and V.
  BlockMemory block_memory() const;
  // As Decoder::weight_types, channel_group.
  std::string weight_types() const;
  int channel_group() const;

 private:
  struct Impl;
  explicit ModelExecutor(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace espalier
