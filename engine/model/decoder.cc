#include "engine/model/decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "engine/model/phase_timer.h"
#include "engine/scheduling/invariant.h"

namespace espalier {
namespace {

// Sequence (as its span's number) and position of consecutive rows of a plan.
std::vector<ProbeRow> RowsOf(const StepPlan& plan, int first_row, int rows) {
  std::vector<ProbeRow> of;
  for (size_t i = 0; i < plan.spans.size(); ++i) {
    const AttentionSpan& span = plan.spans[i];
    const int begin = std::max(first_row, span.first_row);
    const int end = std::min(first_row + rows, span.first_row + span.rows);
    for (int r = begin; r < end; ++r) {
      of.push_back({static_cast<int>(i), span.start + r - span.first_row});
    }
  }
  return of;
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, Backend* backend)
    : config_(config),
      backend_(backend),
      layers_(config.layers),
      inverse_frequency_(InverseFrequencies(config)),
      all_heads_(config.heads),
      all_channels_(config.channels),
      panels_(config.layers) {
  std::iota(all_heads_.begin(), all_heads_.end(), 0);
  std::iota(all_channels_.begin(), all_channels_.end(), 0);
}

void Decoder::NormHeads(std::span<const float> weight, const Matrix& x) {
  if (weight.empty()) return;
  const auto norm = [&](const Matrix& rows) {
    const Matrix heads(rows.data, rows.rows * (rows.cols / config_.head_dim), config_.head_dim);
    backend_->RmsNorm({.x = heads, .weight = weight, .eps = config_.rms_eps, .out = heads});
  };
  if (x.stride == x.cols) return norm(x);  // rows lie end to end, so heads are rows of a matrix
  for (int r = 0; r < x.rows; ++r) norm(Matrix(x.row(r), 1, x.cols));
}

void Decoder::Embed(const StepPlan& plan, Activations* activations, PhaseTimes* phases) {
  PhaseTimer timer(&phases->embed);
  backend_->Embed({.tokens = plan.tokens,
                   .table = embedding_,
                   .out = Matrix(activations->residual.data(), static_cast<int>(plan.tokens.size()),
                                 config_.hidden)});
}

void Decoder::ForwardLayer(int layer, const StepPlan& plan, KvPool* pool, Activations* activations,
                           PhaseTimes* phases) {
  const bool ranks = look_ == Look::kAhead || look_ == Look::kBack;
  const bool stale = look_ == Look::kAhead && probe_->options().stale;
  const auto rank = [&] {
    {
      PhaseTimer timer(&phases->probe);
      if (!RankChannels(layer, plan, activations)) return;
    }
    PhaseTimer timer(&phases->gather);
    panels_[layer].refitted.clear();  // of channels that others have replaced
    int most = 0;
    for (const PlanStep& step : plan.steps) {
      if (!Narrows(layer, step, SiteKind::kChannels)) continue;
      most = std::max(most, step.kept(layer, SiteKind::kChannels));
    }
    GatherRanked(layer, most);
  };
  if (stale) rank();
  AttentionBlock(layer, plan, pool, activations, phases);
  if (ranks && !stale) rank();
  MlpBlock(layer, plan, activations, phases);
  if (!observer_) return;
  observer_(layer, ConstMatrix(activations->residual.data(), static_cast<int>(plan.tokens.size()),
                               config_.hidden));
}

void Decoder::Forward(const StepPlan& plan, KvPool* pool, Activations* activations,
                      PhaseTimes* phases) {
  Embed(plan, activations, phases);
  look_ = probe_ == nullptr ? Look::kNone : NextLook(plan);
  for (int layer = 0; layer < config_.layers; ++layer) {
    ForwardLayer(layer, plan, pool, activations, phases);
  }
}

Look Decoder::NextLook(const StepPlan& plan) {
  int prefill = 0, decode = 0, prompts = 0;
  for (const PlanStep& step : plan.steps) {
    bool narrows = false, teaches = false;
    for (int layer = 0; layer < config_.layers; ++layer) {
      for (const SiteKind kind : {SiteKind::kHeads, SiteKind::kChannels}) {
        const bool here = Narrows(layer, step, kind), told = Teaches(layer, step, kind);
        Invariant((!here && !told) || probe_->history(kind).layers() == config_.layers,
                  "a probe of channels alone meets a rung that narrows heads");
        narrows |= here;
        teaches |= told;
      }
    }
    if (narrows) (step.decode ? decode : prefill) += step.rows;
    if (teaches && !step.decode) prompts += step.rows;
  }
  return prefill + decode + prompts == 0 ? Look::kNone : probe_->Next(prefill, decode, prompts);
}

void Decoder::PackKv(int layer, std::span<const KvPacking> packings, KvPool* pool) {
  backend_->PackKv({.packings = packings, .key_mean = panels_[layer].key_mean, .pool = pool});
}

void Decoder::RopeAndStore(int layer, RopeAndStoreArgs args) {
  args.inverse_frequency = inverse_frequency_;
  args.pairing = config_.rope_interleaved ? RopePairing::kInterleaved : RopePairing::kHalfSplit;
  args.key_mean = panels_[layer].key_mean;
  backend_->RopeAndStore(args);
}

float Decoder::AttentionScale() const {
  return 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
}

int Decoder::FindHeadRuns(int layer, const StepPlan& plan) {
  head_runs_.clear();
  int rows = 0, spans = 0;
  for (const PlanStep& step : plan.steps) {
    if (!step.rung->HoldsKv(layer)) break;  // nor does any after it
    const int heads = KeptNow(layer, step, SiteKind::kHeads);
    if (head_runs_.empty() || head_runs_.back().heads != heads) {
      head_runs_.push_back({.first_row = rows, .first_span = spans, .heads = heads});
    }
    head_runs_.back().rows += step.rows;
    head_runs_.back().spans += step.spans;
    rows += step.rows;
    spans += step.spans;
  }
  return rows;
}

void Decoder::AttentionBlock(int layer, const StepPlan& plan, KvPool* pool,
                             Activations* activations, PhaseTimes* phases) {
  const int rows = FindHeadRuns(layer, plan);
  if (rows == 0) return;  // dropped blocks write no KV
  const Layer& weights = layers_[layer];
  const Panels& panels = panels_[layer];
  const int dim = config_.head_dim;
  const int q_width = config_.heads * dim, kv_width = config_.kv_heads * dim;
  const size_t spans = head_runs_.back().first_span + head_runs_.back().spans;
  const auto step_spans = plan.spans.first(spans);
  const auto tables = plan.tables.subspan(layer * plan.spans.size(), spans);
  const Matrix residual(activations->residual.data(), rows, config_.hidden);
  const Matrix normed(activations->normed.data(), rows, config_.hidden);
  const Matrix q(activations->q.data(), rows, q_width);
  const Matrix k(activations->k.data(), rows, kv_width);
  const Matrix v(activations->v.data(), rows, kv_width);
  const Matrix attended(activations->attention.data(), rows, q_width);
  // The rows of a run, of which the heads kept lie to the left.
  const auto part = [&](const Matrix& m, const HeadRun& run) {
    return Matrix(m.row(run.first_row), run.rows, run.heads * dim, m.stride);
  };
  {
    PhaseTimer timer(&phases->norm);
    backend_->RmsNorm(
        {.x = residual, .weight = weights.attention_norm, .eps = config_.rms_eps, .out = normed});
  }
  if (before_weights_) before_weights_(layer, MatrixInput::kQkv, normed);
  bool stored = false;
  if (look_ == Look::kAhead || look_ == Look::kBack) {
    stored = RankHeads(layer, plan,
                       {.normed = normed,
                        .q = q,
                        .k = k,
                        .v = v,
                        .attended = attended,
                        .spans = step_spans,
                        .tables = tables,
                        .pool = pool},
                       activations, phases);
  }
  {
    PhaseTimer timer(&phases->attention_projections);
    projections_.clear();
    for (const HeadRun& run : head_runs_) {
      if (run.heads == 0) continue;
      const std::vector<float>& bias = AllHeads(run) ? weights.q_bias : panels.q_bias;
      projections_.push_back({.weight = AllHeads(run) ? &weights.q : &panels.q,
                              .out = part(q, run),
                              .first_row = run.first_row,
                              .channels = run.heads * dim,
                              .bias = bias.empty() ? std::span<const float>()
                                                   : std::span(bias).first(run.heads * dim)});
    }
    if (!stored) {
      projections_.push_back({.weight = &weights.k, .out = k, .bias = weights.k_bias});
      projections_.push_back({.weight = &weights.v, .out = v, .bias = weights.v_bias});
    }
    backend_->MatMul({.x = normed, .targets = projections_});
  }
  if (input_observer_) input_observer_(layer, MatrixInput::kQkv, normed);
  {
    PhaseTimer timer(&phases->norm);
    for (const HeadRun& run : head_runs_) NormHeads(weights.q_norm, part(q, run));
    if (!stored) NormHeads(weights.k_norm, k);
  }
  {
    PhaseTimer timer(&phases->attention);
    const int stores = stored ? 0 : kv_width;
    RopeAndStore(layer, {.spans = step_spans,
                         .page_tables = tables,
                         .q = q,
                         .k = Matrix(k.data, rows, stores, k.stride),
                         .v = Matrix(v.data, rows, stores, v.stride),
                         .pool = pool});
    if (key_observer_) key_observer_(layer, k);
    for (const HeadRun& run : head_runs_) {
      backend_->Attention(
          {.spans = step_spans.subspan(run.first_span, run.spans),
           .page_tables = tables.subspan(run.first_span, run.spans),
           .q = Matrix(q.data, rows, run.heads * dim, q.stride),
           .heads_kept = std::span(AllHeads(run) ? all_heads_ : panels.heads).first(run.heads),
           .heads = config_.heads,
           .scale = AttentionScale(),
           .pool = pool,
           .out = Matrix(attended.data, rows, run.heads * dim, attended.stride)});
    }
  }
  if (input_observer_) input_observer_(layer, MatrixInput::kO, attended);
  if (before_weights_) before_weights_(layer, MatrixInput::kO, attended);
  for (int row = 0; const PlanStep& step : plan.steps) {
    if (row == rows) break;
    if (Teaches(layer, step, SiteKind::kHeads)) {
      PhaseTimer timer(&phases->probe);
      const int kept = KeptNow(layer, step, SiteKind::kHeads);
      probe_->Update(layer, SiteKind::kHeads,
                     ConstMatrix(attended.row(row), step.rows, kept * dim, attended.stride),
                     RowsOf(plan, row, step.rows),
                     std::span(kept == config_.heads ? all_heads_ : panels.heads).first(kept));
    }
    row += step.rows;
  }
  PhaseTimer timer(&phases->attention_projections);
  for (const HeadRun& run : head_runs_) {
    if (run.heads == 0) continue;
    const std::array<MatMulTarget, 1> targets = {
        MatMulTarget{.weight = AllHeads(run) ? &weights.o : &panels.o,
                     .out = Matrix(residual.row(run.first_row), run.rows, config_.hidden),
                     .channels = run.heads * dim}};
    backend_->MatMul(
        {.x = part(attended, run), .targets = targets, .output = MatMulArgs::Output::kAdd});
  }
}

void Decoder::MlpBlock(int layer, const StepPlan& plan, Activations* activations,
                       PhaseTimes* phases) {
  const Layer& weights = layers_[layer];
  const Panels& panels = panels_[layer];
  const auto kept_by = [&](const PlanStep& step) {
    return KeptNow(layer, step, SiteKind::kChannels);
  };
  const bool observed =
      channel_observer_ != nullptr && (observed_layer_ == kEveryLayer || observed_layer_ == layer);
  int whole_rows = 0, narrow_rows = 0;
  for (const PlanStep& step : plan.steps) {
    if (kept_by(step) > 0) {
      (kept_by(step) == config_.channels ? whole_rows : narrow_rows) += step.rows;
    }
  }
  // Few rows that keep all channels join those that keep some at gate and up, to open those weights
  // once. Many do better by themselves: their channels are then quantised where they are made.
  constexpr int kFewRows = 32;
  const bool join = narrow_rows > 0 && whole_rows <= kFewRows && !observed &&
                    panels.gate.rows == config_.channels;
  enum class By : uint8_t { kNothing, kPanels, kWeights };
  const auto multiplied_by = [&](const PlanStep& step) {
    const int kept = kept_by(step);
    if (kept == 0) return By::kNothing;
    return kept == config_.channels && !join ? By::kWeights : By::kPanels;
  };
  int first_row = 0;
  for (size_t begin = 0, end; begin < plan.steps.size(); begin = end) {
    const By by = multiplied_by(plan.steps[begin]);
    int rows = 0, most = 0;
    bool told = false;
    mlp_steps_.clear();
    for (end = begin; end < plan.steps.size() && multiplied_by(plan.steps[end]) == by; ++end) {
      const int kept = kept_by(plan.steps[end]);
      const bool all = kept == config_.channels;
      if (mlp_steps_.empty() || mlp_steps_.back().channels != kept) {
        MlpStep& step = mlp_steps_.emplace_back(
            MlpStep{.channels = kept, .down = all ? &weights.down : &panels.down});
        if (all && by == By::kPanels) step.places = panels.channels;
        if (const auto own = panels.refitted.find(kept); !all && own != panels.refitted.end()) {
          if (own->second.down.has_value()) step.down = &*own->second.down;
          step.bias = own->second.bias;
        }
      }
      mlp_steps_.back().rows += plan.steps[end].rows;
      rows += plan.steps[end].rows;
      told |= Teaches(layer, plan.steps[end], SiteKind::kChannels);
      most = std::max(most, kept);
    }
    const auto part = [&](const AlignedFloats& buffer, int width, int cols) {
      return Matrix(buffer.data() + int64_t{first_row} * width, rows, cols);
    };
    const Matrix residual = part(activations->residual, config_.hidden, config_.hidden);
    const Matrix normed = part(activations->normed, config_.hidden, config_.hidden);
    const Matrix gate = part(activations->gate, config_.channels, most);
    const Matrix up = part(activations->up, config_.channels, most);
    first_row += rows;
    if (by == By::kNothing) continue;
    {
      PhaseTimer timer(&phases->norm);
      backend_->RmsNorm(
          {.x = residual, .weight = weights.mlp_norm, .eps = config_.rms_eps, .out = normed});
    }
    if (input_observer_) input_observer_(layer, MatrixInput::kGateUp, normed);
    if (before_weights_) {
      MlpByParts(layer, normed, gate, up, residual);
      continue;
    }
    if (by == By::kPanels && most > panels.gate.rows) {  // a narrower step ranked
      PhaseTimer timer(&phases->gather);
      GatherRanked(layer, panels.counts.back());
    }
    PhaseTimer timer(&phases->mlp);
    backend_->GatedMlp({.x = normed,
                        .gate = by == By::kWeights ? weights.gate : panels.gate,
                        .up = by == By::kWeights ? weights.up : panels.up,
                        .steps = mlp_steps_,
                        .gate_room = gate,
                        .up_room = up,
                        .out = residual,
                        .keep_hidden = observed || told});
    if (observed) {
      for (int row = 0; const MlpStep& step : mlp_steps_) {
        channel_observer_(layer, ConstMatrix(up.row(row), step.rows, step.channels, up.stride));
        row += step.rows;
      }
    }
    if (!told) continue;
    const std::vector<ProbeRow> rows_of = RowsOf(plan, first_row - rows, rows);
    const std::span<const int32_t> channels =
        by == By::kPanels ? panels.channels : std::span<const int32_t>(all_channels_);
    int row = 0;
    for (const PlanStep& step : std::span(plan.steps).subspan(begin, end - begin)) {
      if (Teaches(layer, step, SiteKind::kChannels)) {
        const int kept = kept_by(step);
        probe_->Update(layer, SiteKind::kChannels,
                       ConstMatrix(up.row(row), step.rows, kept, up.stride),
                       std::span(rows_of).subspan(row, step.rows), channels.first(kept));
      }
      row += step.rows;
    }
  }
}

void Decoder::MlpByParts(int layer, ConstMatrix x, const Matrix& gate, const Matrix& up,
                         const Matrix& out) {
  Invariant(gate.cols == config_.channels, "a narrowed step is told no inputs in parts");
  before_weights_(layer, MatrixInput::kGateUp, x);
  const Layer& weights = layers_[layer];
  const MatMulTarget widen[] = {{.weight = &weights.gate, .out = gate},
                                {.weight = &weights.up, .out = up}};
  backend_->MatMul({.x = x, .targets = widen});
  backend_->SwiGlu({.gate = gate, .up = up, .out = gate});
  before_weights_(layer, MatrixInput::kDown, gate);
  const MatMulTarget narrow[] = {{.weight = &weights.down, .out = out}};
  backend_->MatMul({.x = gate, .targets = narrow, .output = MatMulArgs::Output::kAdd});
}

Decoder::LookedAt Decoder::RowsLookedAt(int layer, const StepPlan& plan, SiteKind kind) const {
  const std::vector<ProbeRow> all = RowsOf(plan, 0, static_cast<int>(plan.tokens.size()));
  LookedAt looked_at;
  for (int first = 0; const PlanStep& step : plan.steps) {
    const bool looks = Narrows(layer, step, kind) && step.decode == (look_ == Look::kBack);
    for (int r = first; looks && r < first + step.rows; ++r) {
      looked_at.rows.push_back(r);
      looked_at.of_rows.push_back(all[r]);
    }
    first += step.rows;
  }
  return looked_at;
}

Decoder::LookedAt Decoder::RowsProbed(const LookedAt& looked_at,
                                      const Activations& activations) const {
  std::vector<float> norms(looked_at.rows.size());
  if (probe_->options().rows == ProbeOptions::Rows::kTopNorm) {
    for (size_t i = 0; i < norms.size(); ++i) {
      const float* const x =
          activations.residual.data() + int64_t{looked_at.rows[i]} * config_.hidden;
      norms[i] = std::sqrt(std::transform_reduce(x, x + config_.hidden, x, 0.0f));
    }
  }
  LookedAt probed;
  for (const int chosen : ChooseProbeRows(probe_->options(), norms, looked_at.of_rows)) {
    probed.rows.push_back(looked_at.rows[chosen]);
    probed.of_rows.push_back(looked_at.of_rows[chosen]);
  }
  return probed;
}

std::vector<int32_t> Decoder::ProbeHeads(int layer, const LookedAt& looked_at,
                                         const AttentionMatrices& at, Activations* activations,
                                         PhaseTimes* phases) {
  const Layer& weights = layers_[layer];
  {
    PhaseTimer timer(&phases->attention_projections);
    const MatMulTarget targets[] = {{.weight = &weights.k, .out = at.k, .bias = weights.k_bias},
                                    {.weight = &weights.v, .out = at.v, .bias = weights.v_bias}};
    backend_->MatMul({.x = at.normed, .targets = targets});
    NormHeads(weights.k_norm, at.k);
  }
  const int hidden = config_.hidden, width = at.q.cols;
  LookedAt probed;
  Matrix held;
  {
    PhaseTimer timer(&phases->probe);
    probed = RowsProbed(looked_at, *activations);
    const int count = static_cast<int>(probed.rows.size());
    const Matrix x(activations->gate.data(), count, hidden);  // free until the MLP
    held = Matrix(activations->up.data(), count, width);
    for (int i = 0; i < count; ++i) std::copy_n(at.normed.row(probed.rows[i]), hidden, x.row(i));
    const MatMulTarget target[] = {{.weight = &weights.q, .out = held, .bias = weights.q_bias}};
    backend_->MatMul({.x = x, .targets = target});
    NormHeads(weights.q_norm, held);
    // Where the step's own queries will be: what the other rows hold is nobody's.
    for (int i = 0; i < count; ++i) std::copy_n(held.row(i), width, at.q.row(probed.rows[i]));
  }
  {
    PhaseTimer timer(&phases->attention);
    RopeAndStore(layer, {.spans = at.spans,
                         .page_tables = at.tables,
                         .q = at.q,
                         .k = at.k,
                         .v = at.v,
                         .pool = at.pool});
  }
  PhaseTimer timer(&phases->probe);
  std::vector<AttentionSpan> spans;
  std::vector<std::span<const int32_t>> tables;
  for (int i = 0; i < held.rows; ++i) {
    const int of = probed.of_rows[i].sequence;
    spans.push_back({.first_row = probed.rows[i],
                     .rows = 1,
                     .start = probed.of_rows[i].position,
                     .int4_kv = at.spans[of].int4_kv});
    tables.push_back(at.tables[of]);
  }
  backend_->Attention({.spans = spans,
                       .page_tables = tables,
                       .q = at.q,
                       .heads_kept = all_heads_,
                       .heads = config_.heads,
                       .scale = AttentionScale(),
                       .pool = at.pool,
                       .out = at.attended});
  for (int i = 0; i < held.rows; ++i) {
    std::copy_n(at.attended.row(probed.rows[i]), width, held.row(i));
  }
  return probe_->Rank(layer, SiteKind::kHeads, held, probed.of_rows, panels_[layer].head_counts);
}

bool Decoder::RankHeads(int layer, const StepPlan& plan, const AttentionMatrices& at,
                        Activations* activations, PhaseTimes* phases) {
  Panels& panels = panels_[layer];
  const LookedAt looked_at = RowsLookedAt(layer, plan, SiteKind::kHeads);
  if (looked_at.rows.empty()) return false;
  const bool ahead = look_ == Look::kAhead;
  std::vector<int32_t> ranking;
  if (ahead) {
    ranking = ProbeHeads(layer, looked_at, at, activations, phases);
  } else {
    PhaseTimer timer(&phases->probe);
    ranking = probe_->RankByHistory(layer, SiteKind::kHeads, looked_at.of_rows, panels.head_counts);
  }
  if (ranking.empty()) return ahead;
  PhaseTimer timer(&phases->gather);
  const absl::Status gathered =
      MakeHeadPanels(layer, std::span(ranking).first(panels.head_counts.back()), &panels);
  Invariant(gathered.ok(), "a panel does not fit where it was before: {}", gathered.ToString());
  return ahead;
}

bool Decoder::RankChannels(int layer, const StepPlan& plan, Activations* activations) {
  const Layer& weights = layers_[layer];
  const int hidden = config_.hidden, channels = config_.channels;
  const LookedAt looked_at = RowsLookedAt(layer, plan, SiteKind::kChannels);
  if (looked_at.rows.empty()) return false;
  Panels& panels = panels_[layer];
  const auto take = [&](std::vector<int32_t> ranking) {
    const bool ranked = !ranking.empty();
    if (ranked) panels.channels = std::move(ranking);
    return ranked;
  };
  if (look_ == Look::kBack) {
    return take(
        probe_->RankByHistory(layer, SiteKind::kChannels, looked_at.of_rows, panels.counts));
  }
  const LookedAt probed = RowsProbed(looked_at, *activations);
  const int count = static_cast<int>(probed.rows.size());
  const Matrix normed(activations->normed.data(), count, hidden);  // the step's rows come later
  const Matrix gate(activations->gate.data(), count, channels);
  const Matrix up(activations->up.data(), count, channels);
  for (int i = 0; i < count; ++i) {
    std::copy_n(activations->residual.data() + int64_t{probed.rows[i]} * hidden, hidden,
                normed.row(i));
  }
  backend_->RmsNorm(
      {.x = normed, .weight = weights.mlp_norm, .eps = config_.rms_eps, .out = normed});
  const MatMulTarget targets[] = {{.weight = &weights.gate, .out = gate},
                                  {.weight = &weights.up, .out = up}};
  backend_->MatMul({.x = normed, .targets = targets});
  backend_->SwiGlu({.gate = gate, .up = up, .out = gate});
  return take(probe_->Rank(layer, SiteKind::kChannels, gate, probed.of_rows, panels.counts));
}

void Decoder::GatherRanked(int layer, int count) {
  const Layer& weights = layers_[layer];
  Panels& panels = panels_[layer];
  const absl::Status gathered = Gather(
      {{&weights.gate, &panels.gate}, {&weights.up, &panels.up}, {&weights.down, &panels.down}},
      std::span<const int32_t>(panels.channels).first(count));
  Invariant(gathered.ok(), "a panel does not fit where it was before: {}", gathered.ToString());
}

void Decoder::Logits(std::span<const int32_t> rows, Activations* activations, Matrix logits) {
  const int count = static_cast<int>(rows.size());
  const Matrix normed(activations->normed.data(), count, config_.hidden);
  // Consecutive rows go in one call: a step's decode rows and a scored chunk both are.
  for (int begin = 0; begin < count;) {
    int end = begin + 1;
    while (end < count && rows[end] == rows[end - 1] + 1) ++end;
    const Matrix source(
        activations->residual.data() + static_cast<int64_t>(rows[begin]) * config_.hidden,
        end - begin, config_.hidden);
    backend_->RmsNorm({.x = source,
                       .weight = final_norm_,
                       .eps = config_.rms_eps,
                       .out = Matrix(normed.row(begin), end - begin, config_.hidden)});
    begin = end;
  }
  const std::array<MatMulTarget, 1> targets = {MatMulTarget{.weight = &head_, .out = logits}};
  backend_->MatMul({.x = normed, .targets = targets});
}

}  // namespace espalier
