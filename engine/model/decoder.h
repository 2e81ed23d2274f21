// The decoder of the llama family: weights on a backend, and one forward pass over a step's rows.
//
// Rows of a step may be on different rungs of the ladder. Those that keep all of a site meet its
// weights as loaded; the others panels, in which the site's channels lie in the order of their
// ranking, so that each rung is a prefix. Dense is a step of which every row keeps all.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/activations.h"
#include "engine/model/files/model_file.h"
#include "engine/model/weight_plan.h"
#include "engine/model_config.h"
#include "engine/pruning/channel_selector.h"
#include "engine/pruning/probe.h"
#include "engine/pruning/weights/matrix_input.h"
#include "engine/scheduling/batch.h"
#include "kernels/backend.h"
#include "policy/blocks/block_memory.h"
#include "policy/ladder.h"
#include "policy/policy.h"

namespace espalier {

// Consecutive rows, whole spans, that are narrowed alike.
struct PlanStep {
  int rows = 0;
  int spans = 0;
  const Rung* rung = nullptr;
  bool decode = false;

  int kept(int layer, SiteKind kind) const {
    return (decode ? rung->decode : rung->prefill).kept(layer, kind);
  }
};

// A step; made once and used by every layer.
struct StepPlan {
  std::span<const int32_t> tokens;  // [rows]
  std::span<const AttentionSpan> spans;
  std::span<const std::span<const int32_t>> tables;  // [layers * spans], layer-major
  // Of all rows, in the order of their rungs: those that hold K and V of a layer come first.
  std::span<const PlanStep> steps;
};

// What released weights are read from again. It keeps the files open.
struct WeightSources {
  std::shared_ptr<const ModelFile> model;           // null: nothing is ever released
  std::shared_ptr<const ChannelSelector> channels;  // that panels were made by
  std::vector<const MappedFile*> files;             // where the two lie
};

class Decoder {
 public:
  // Uploads every weight of `file`, calling progress(done, total) after each. Errors name file and
  // tensor; Cancelled if progress says false. `backend` must outlive the model; `file` may be
  // closed afterwards.
  static absl::StatusOr<std::unique_ptr<Decoder>> Load(
      const ModelFile& file, Backend* backend, WeightPlan plan,
      const std::function<bool(int done, int total)>& progress);

  const ModelConfig& config() const { return config_; }
  // As loaded, and of the panels.
  uint64_t weight_bytes() const { return weight_bytes_; }
  uint64_t panel_bytes() const { return panel_bytes_; }
  // What blocks take, a layer's mean where they differ, and what is left; kv_bytes stays zero.
  BlockMemory block_memory() const;
  // The types of its matrices, e.g. "int4+int8", and ", 2:4" if all of its layers' are.
  std::string weight_types() const;
  // Channels leave in whole aligned groups of so many: of kSparseGroup where every `down` is 2:4
  // along them, so that what is left of it still is; else of one.
  int channel_group() const;

  // Makes the panels that the ladder's rungs need, in place of those there were. InvalidArgument,
  // with rung and layer, for a count of channels that is neither all nor a multiple of kQuantGroup;
  // ResourceExhausted if there is no memory. Then the old panels stay.
  absl::Status MakePanels(const Ladder& ladder, const ChannelSelector& selector);

  // From now on weights may leave memory. Those of MakePanels' last ladder, without a probe.
  void KeepSources(WeightSources sources);
  // A probe gathers panels anew at any step.
  bool may_release() const { return sources_.model != nullptr && probe_ == nullptr; }
  // Of the weights, panels among them, what is not needed while rungs of the set alone are served.
  uint64_t ReleasableBytes(RungSet served) const;
  uint64_t released_bytes() const { return released_bytes_; }
  bool any_released() const { return released_ > 0; }
  bool SourcesUnchanged() const;
  // What rungs of the set need of a layer comes back, as it was to the bit, and the rest leaves.
  // Only while may_release(). DataLoss if the sources have other values than before.
  absl::Status FitLayer(int layer, RungSet served);

  // Makes int4 pages of a layer's int8 ones.
  void PackKv(int layer, std::span<const KvPacking> packings, KvPool* pool);

  // Runs all layers over the plan's rows, on rungs of the ladder that panels were made for;
  // afterwards activations->residual holds the last layer's output and the pages hold K and V of
  // every row. Adds its times to `phases`.
  void Forward(const StepPlan& plan, KvPool* pool, Activations* activations, PhaseTimes* phases);
  // Its parts: what tokens embed to, and one layer over activations->residual.
  void Embed(const StepPlan& plan, Activations* activations, PhaseTimes* phases);
  void ForwardLayer(int layer, const StepPlan& plan, KvPool* pool, Activations* activations,
                    PhaseTimes* phases);

  // Final norm and LM head of the residual rows listed; logits is [rows listed, vocabulary].
  void Logits(std::span<const int32_t> rows, Activations* activations, Matrix logits);

  // While there is one, layers that a step narrows are ranked anew when it says so: by a probe of
  // the step's narrowed prefill rows, or by its history. Other steps meet the last ranking. Refits
  // are left aside: they belong to the rankings they were made for. Null: none. Must outlive its
  // use.
  void set_probe(Probe* probe) {
    probe_ = probe;
    look_ = Look::kNone;
  }
  // What the last step did with it.
  Look look() const { return look_; }

  // Called with the residual stream after each layer ([rows, hidden]); for tests.
  void set_layer_observer(std::function<void(int layer, ConstMatrix residual)> observer) {
    observer_ = std::move(observer);
  }

  // Called with what meets `down` in a layer, silu(gate) * up: once for consecutive rows that keep
  // as many channels, [rows, kept], in natural order if they keep all, else in that of the ranking.
  // Of one layer or of every one: where it is not called, nothing is written for it.
  using ChannelObserver = std::function<void(int layer, ConstMatrix hidden)>;
  void set_channel_observer(ChannelObserver observer, int layer = kEveryLayer) {
    channel_observer_ = std::move(observer);
    observed_layer_ = layer;
  }
  static constexpr int kEveryLayer = -1;

  // Called with a layer's rotated keys ([rows, kv_heads * head_dim]); for calibration.
  void set_key_observer(std::function<void(int layer, ConstMatrix keys)> observer) {
    key_observer_ = std::move(observer);
  }

  // Called with what else meets weights of a layer, [rows, columns of the weight], of rows that
  // keep all. For calibration.
  using InputObserver = std::function<void(int layer, MatrixInput input, ConstMatrix rows)>;
  void set_input_observer(InputObserver observer) { input_observer_ = std::move(observer); }

  // Called with each input of a layer before it meets weights, [rows, columns]; what is replaced
  // then is what the rows meet. Only of steps that narrow nothing. For pruning weights.
  void set_before_weights(InputObserver before) { before_weights_ = std::move(before); }
  // A matrix of a layer, `part` as files name it ("attn_q"), gets these values, [outputs, inputs],
  // kept as `plan` keeps floats. Only while there are neither panels nor sources. On an error, of
  // the backend, the old ones stay.
  absl::Status ReplaceWeight(int layer, std::string_view part, ConstMatrix values, WeightPlan plan);

 private:
  struct Layer {
    std::vector<float> attention_norm;
    std::vector<float> mlp_norm;
    Weight q, k, v;                             // [heads * head_dim | kv_heads * head_dim, hidden]
    std::vector<float> q_bias, k_bias, v_bias;  // one a row, or empty
    std::vector<float> q_norm, k_norm;          // [head_dim] or empty
    Weight o;                                   // [heads * head_dim, hidden]
    Weight gate, up;                            // [channels, hidden]
    Weight down;                                // [channels, hidden]
  };

  // What rows are multiplied by that keep some of a site, in the order of its ranking: as many
  // heads or channels as the widest such rung keeps, but for gate and up, which have all. After a
  // ranking by a probe, gate, up and down have what the steps since then needed.
  struct Panels {
    std::vector<int32_t> heads;
    std::vector<int> head_counts;  // that rungs keep of some, ascending
    Weight q, o;
    std::vector<float> q_bias;
    std::vector<int32_t> channels;  // all, best first
    std::vector<int> counts;        // that rungs keep of some, ascending
    Weight gate, up, down;
    struct Refitted {
      std::optional<Weight> down;  // none: the one for all
      std::vector<float> bias;
    };
    std::map<int, Refitted> refitted;  // by count of channels
    std::vector<float> key_mean;       // left out of keys in int4 pages; may be empty
  };

  // A weight that may leave memory while no rung of `users` is served.
  struct Releasable {
    enum class Origin : uint8_t { kFile, kPanel, kRefit };

    int layer = 0;
    Origin origin = Origin::kFile;
    Weight* weight = nullptr;
    RungSet users = 0;
    const char* name = "";  // kFile: of the tensor, within its layer
    size_t from = 0;        // kPanel: in releasable_, what it is gathered from
    int count = 0;          // kRefit: of channels
    uint64_t checksum = 0;  // since it was first released
  };

  // Consecutive rows that keep as many heads.
  struct HeadRun {
    int first_row = 0;
    int rows = 0;
    int first_span = 0;
    int spans = 0;
    int heads = 0;
  };

  // What a layer's attention works on, of the rows that hold K and V.
  struct AttentionMatrices {
    ConstMatrix normed;
    Matrix q, k, v, attended;
    std::span<const AttentionSpan> spans;
    std::span<const std::span<const int32_t>> tables;
    KvPool* pool = nullptr;
  };

  Decoder(const ModelConfig& config, Backend* backend);

  void ListReleasable(const Ladder& ladder);
  absl::Status Refill(Releasable* part);
  // Panels of the same rows of several weights.
  absl::Status Gather(std::initializer_list<std::pair<const Weight*, Weight*>> weights,
                      std::span<const int32_t> rows) const;
  // Of the most that a rung keeps of some, by their ranking.
  absl::Status MakeHeadPanels(int layer, std::span<const int32_t> heads, Panels* panels) const;
  // For rungs that keep so many of the ranked channels.
  absl::Status MakeChannelPanels(int layer, const ChannelSelector& selector,
                                 const std::set<int>& counts, Panels* panels) const;
  void AttentionBlock(int layer, const StepPlan& plan, KvPool* pool, Activations* activations,
                      PhaseTimes* phases);
  void MlpBlock(int layer, const StepPlan& plan, Activations* activations, PhaseTimes* phases);
  // Gate, up and down one by one, each after its input was told.
  void MlpByParts(int layer, ConstMatrix x, const Matrix& gate, const Matrix& up,
                  const Matrix& out);
  // Whether the step keeps some of a site, but not all.
  bool Narrows(int layer, const PlanStep& step, SiteKind kind) const {
    const int kept = step.kept(layer, kind);
    return kept > 0 && kept < config_.sites().of(kind);
  }
  // How much of a site the step keeps, unless it is to see all of it for once.
  int KeptNow(int layer, const PlanStep& step, SiteKind kind) const {
    return look_ == Look::kWhole && Narrows(layer, step, kind) ? config_.sites().of(kind)
                                                               : step.kept(layer, kind);
  }
  // Whether the probe is told what the step's rows held.
  bool Teaches(int layer, const PlanStep& step, SiteKind kind) const {
    if (probe_ == nullptr) return false;
    if (!probe_->by_prompts()) return probe_->learns() && Narrows(layer, step, kind);
    const int later = step.rung->decode.kept(layer, kind);
    return !step.decode && step.kept(layer, kind) > 0 && later > 0 &&
           later < config_.sites().of(kind);
  }
  Look NextLook(const StepPlan& plan);
  // Rows of a plan that a ranking goes by: those that the step narrows there, prefill or decode
  // rows as look_ says.
  struct LookedAt {
    std::vector<int> rows;  // the plan's
    std::vector<ProbeRow> of_rows;
  };
  LookedAt RowsLookedAt(int layer, const StepPlan& plan, SiteKind kind) const;
  // Those of them that are probed.
  LookedAt RowsProbed(const LookedAt& looked_at, const Activations& activations) const;
  // Ranks a layer's channels as look_ says, by the rows looked at. False: there are none, or
  // nothing is known of them, and the ranking is as it was.
  bool RankChannels(int layer, const StepPlan& plan, Activations* activations);
  // A ranking of its heads by probed rows, which attend by all of them to all that is before them;
  // for that it stores K and V of the step's rows.
  std::vector<int32_t> ProbeHeads(int layer, const LookedAt& looked_at, const AttentionMatrices& at,
                                  Activations* activations, PhaseTimes* phases);
  // Ranks its heads as look_ says and makes panels for them. True: K and V are stored.
  bool RankHeads(int layer, const StepPlan& plan, const AttentionMatrices& at,
                 Activations* activations, PhaseTimes* phases);
  // Panels of the first `count` channels of a ranking that is not the one they were made for.
  void GatherRanked(int layer, int count);
  // With how this model rotates, and the layer's mean keys.
  void RopeAndStore(int layer, RopeAndStoreArgs args);
  float AttentionScale() const;
  // Fills head_runs_ from the steps that hold K and V of the layer; returns their rows.
  int FindHeadRuns(int layer, const StepPlan& plan);
  bool AllHeads(const HeadRun& run) const { return run.heads == config_.heads; }
  // RMS norm of each head for itself, in place; none if `weight` is empty.
  void NormHeads(std::span<const float> weight, const Matrix& x);

  ModelConfig config_;
  Backend* backend_;
  std::vector<Layer> layers_;
  Weight embedding_;
  Weight head_;  // the embedding itself if tied
  std::vector<float> final_norm_;
  std::vector<float> inverse_frequency_;
  std::vector<int32_t> all_heads_, all_channels_;  // 0, 1, ..
  std::vector<Panels> panels_;                     // [layers]
  uint64_t weight_bytes_ = 0;
  uint64_t panel_bytes_ = 0;
  std::vector<Releasable> releasable_;  // by layer; in each what others are gathered from is first
  WeightSources sources_;
  uint64_t released_bytes_ = 0;
  int released_ = 0;                // weights
  std::vector<HeadRun> head_runs_;  // of the block in hand, as are the next
  std::vector<MatMulTarget> projections_;
  std::vector<MlpStep> mlp_steps_;
  std::function<void(int, ConstMatrix)> observer_;
  ChannelObserver channel_observer_;
  int observed_layer_ = kEveryLayer;
  std::function<void(int, ConstMatrix)> key_observer_;
  InputObserver input_observer_;
  InputObserver before_weights_;
  Probe* probe_ = nullptr;
  Look look_ = Look::kNone;  // of the step in hand
};

}  // namespace espalier
