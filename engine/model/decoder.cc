#include "engine/model/decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "engine/model/phase_timer.h"
#include "fmt/format.h"

namespace espalier {
namespace {

// Reads tensors of one file onto one backend and counts them for the progress bar. After the first
// fault, which stays in status(), nothing more is read.
class Loader {
 public:
  Loader(const ModelFile& file, Backend* backend, WeightPlan plan, int total,
         const std::function<void(int, int)>& progress)
      : file_(file), backend_(backend), plan_(plan), total_(total), progress_(progress) {}

  void Vector(const std::string& name, int size, std::vector<float>* out) {
    const StoredTensor* tensor = Find(name, 1, size);
    if (tensor == nullptr) return;
    out->resize(size);
    tensor->ReadRow(0, out->data());
    if (!std::ranges::all_of(*out, [](float value) { return std::isfinite(value); })) {
      status_ = absl::InvalidArgumentError(fmt::format(
          "{}: tensor {}: expected finite values, got an infinity or NaN", file_.path(), name));
      return;
    }
    Count();
  }

  // [rows, cols] as stored: a row is an output channel.
  void OutputRows(const std::string& name, int rows, int cols, Weight* out) {
    Upload(name, rows, cols, WeightLayout::kOutputRows, out);
  }

  // Stored [outputs, inputs], a matrix of [inputs, outputs]: a row is an input channel.
  void InputRows(const std::string& name, int outputs, int inputs, Weight* out) {
    Upload(name, outputs, inputs, WeightLayout::kInputRows, out);
  }

  const absl::Status& status() const { return status_; }
  uint64_t bytes() const { return bytes_; }

 private:
  WeightType TypeFor(const StoredTensor& tensor) const {
    return TypeOf(plan_, tensor.type, tensor.name.starts_with("blk."));
  }

  // Null after a fault.
  const StoredTensor* Find(const std::string& name, int rows, int cols) {
    if (!status_.ok()) return nullptr;
    const absl::StatusOr<const StoredTensor*> tensor = file_.Find(name, rows, cols);
    status_ = tensor.status();
    return tensor.ok() ? *tensor : nullptr;
  }

  void Upload(const std::string& name, int outputs, int depth, WeightLayout layout, Weight* out) {
    const StoredTensor* tensor = Find(name, outputs, depth);
    if (tensor == nullptr) return;
    const bool output_rows = layout == WeightLayout::kOutputRows;
    WeightSource source = {.read_values = [tensor](int n, float* dst) { tensor->ReadRow(n, dst); }};
    if (tensor->type == BlockType::kQ4_1) {
      static_assert(sizeof(FourBitGroup) == 20);  // of a block
      source.read_groups = [tensor, depth](int n, FourBitGroup* dst) {
        std::memcpy(dst, tensor->row(n), depth / kQuantGroup * sizeof(FourBitGroup));
      };
    }
    absl::StatusOr<Weight> weight =
        backend_->UploadWeight(TypeFor(*tensor), layout, output_rows ? outputs : depth,
                               output_rows ? depth : outputs, source);
    if (!weight.ok()) {
      status_ = absl::Status(weight.status().code(), fmt::format("{}: tensor {}: {}", file_.path(),
                                                                 name, weight.status().ToString()));
      return;
    }
    *out = *std::move(weight);
    bytes_ += out->bytes;
    Count();
  }

  void Count() {
    if (progress_) progress_(++done_, total_);
  }

  const ModelFile& file_;
  Backend* backend_;
  WeightPlan plan_;
  int done_ = 0;
  int total_;
  const std::function<void(int, int)>& progress_;
  absl::Status status_;
  uint64_t bytes_ = 0;
};

}  // namespace

Decoder::Decoder(const ModelConfig& config, Backend* backend)
    : config_(config),
      backend_(backend),
      layers_(config.layers),
      inverse_frequency_(InverseFrequencies(config)) {
  head_rows_.reserve(static_cast<size_t>(config.heads) * config.head_dim);
  head_bias_.reserve(head_rows_.capacity());
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Load(
    const ModelFile& file, Backend* backend, WeightPlan plan,
    const std::function<void(int, int)>& progress) {
  const ModelConfig& config = file.config();
  std::unique_ptr<Decoder> model(new Decoder(config, backend));
  const int total = (9 + 3 * config.qkv_bias + 2 * config.qk_norm) * config.layers +
                    (config.tied_embeddings ? 2 : 3);
  Loader load(file, backend, plan, total, progress);
  const int query_width = config.heads * config.head_dim;
  const int kv_width = config.kv_heads * config.head_dim;

  load.OutputRows("token_embd.weight", config.vocabulary, config.hidden, &model->embedding_);
  for (int i = 0; i < config.layers; ++i) {
    Layer& layer = model->layers_[i];
    const auto name = [i](const char* part) { return fmt::format("blk.{}.{}.weight", i, part); };
    load.Vector(name("attn_norm"), config.hidden, &layer.attention_norm);
    load.OutputRows(name("attn_q"), query_width, config.hidden, &layer.q);
    load.OutputRows(name("attn_k"), kv_width, config.hidden, &layer.k);
    load.OutputRows(name("attn_v"), kv_width, config.hidden, &layer.v);
    load.InputRows(name("attn_output"), config.hidden, query_width, &layer.o);
    load.Vector(name("ffn_norm"), config.hidden, &layer.mlp_norm);
    load.OutputRows(name("ffn_gate"), config.channels, config.hidden, &layer.gate);
    load.OutputRows(name("ffn_up"), config.channels, config.hidden, &layer.up);
    load.InputRows(name("ffn_down"), config.hidden, config.channels, &layer.down);
    if (config.qkv_bias) {
      const auto bias = [i](const char* part) { return fmt::format("blk.{}.{}.bias", i, part); };
      load.Vector(bias("attn_q"), query_width, &layer.q_bias);
      load.Vector(bias("attn_k"), kv_width, &layer.k_bias);
      load.Vector(bias("attn_v"), kv_width, &layer.v_bias);
    }
    if (config.qk_norm) {
      load.Vector(name("attn_q_norm"), config.head_dim, &layer.q_norm);
      load.Vector(name("attn_k_norm"), config.head_dim, &layer.k_norm);
    }
  }
  load.Vector("output_norm.weight", config.hidden, &model->final_norm_);
  if (config.tied_embeddings) {
    model->head_ = model->embedding_;
  } else {
    load.OutputRows("output.weight", config.vocabulary, config.hidden, &model->head_);
  }
  if (!load.status().ok()) return load.status();
  model->weight_bytes_ = load.bytes();
  return model;
}

std::string Decoder::weight_types() const {
  bool used[4] = {};
  used[static_cast<int>(head_.type)] = used[static_cast<int>(embedding_.type)] = true;
  for (const Layer& layer : layers_) {
    for (const Weight* weight :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      used[static_cast<int>(weight->type)] = true;
    }
  }
  std::string names;
  for (const WeightType type :
       {WeightType::kInt4, WeightType::kInt8, WeightType::kBf16, WeightType::kF32}) {
    if (!used[static_cast<int>(type)]) continue;
    names += fmt::format("{}{}", names.empty() ? "" : "+", WeightTypeName(type));
  }
  return names;
}

ChannelSelection Decoder::HeadRows(const ChannelSelection& heads) {
  const int dim = config_.head_dim;
  if (heads.all()) return ChannelSelection::All(heads.count() * dim);
  head_rows_.clear();
  for (int i = 0; i < heads.count(); ++i) {
    for (int d = 0; d < dim; ++d) head_rows_.push_back(heads[i] * dim + d);
  }
  return ChannelSelection::Of(head_rows_);
}

std::span<const float> Decoder::HeadBias(std::span<const float> bias,
                                         const ChannelSelection& head_rows) {
  if (bias.empty() || head_rows.all()) return bias;
  head_bias_.clear();
  for (int i = 0; i < head_rows.count(); ++i) head_bias_.push_back(bias[head_rows[i]]);
  return head_bias_;
}

void Decoder::NormHeads(std::span<const float> weight, const Matrix& x) {
  if (weight.empty()) return;
  // Rows lie end to end, so a head is a row of this view.
  const Matrix heads(x.data, x.rows * (x.cols / config_.head_dim), config_.head_dim);
  backend_->RmsNorm({.x = heads, .weight = weight, .eps = config_.rms_eps, .out = heads});
}

void Decoder::Forward(const StepPlan& plan, const KeepProfile& keep, ChannelSelector* selector,
                      KvPool* pool, Activations* activations, PhaseTimes* phases) {
  const int rows = static_cast<int>(plan.tokens.size());
  const Matrix residual(activations->residual.data(), rows, config_.hidden);
  {
    PhaseTimer timer(&phases->embed);
    backend_->Embed({.tokens = plan.tokens, .table = embedding_, .out = residual});
  }
  for (int layer = 0; layer < config_.layers; ++layer) {
    const auto choose = [&](SiteKind kind) {
      return selector->Choose(layer, kind, keep.kept(layer, kind));
    };
    AttentionBlock(layer, plan, choose(SiteKind::kHeads), pool, activations, phases);
    MlpBlock(layer, choose(SiteKind::kChannels), rows, activations, phases);
    if (observer_) observer_(layer, residual);
  }
}

void Decoder::AttentionBlock(int layer, const StepPlan& plan, const ChannelSelection& heads,
                             KvPool* pool, Activations* activations, PhaseTimes* phases) {
  if (heads.count() == 0) return;  // a dropped block writes no KV
  const Layer& weights = layers_[layer];
  const int rows = static_cast<int>(plan.tokens.size());
  const int kv_width = config_.kv_heads * config_.head_dim;
  const ChannelSelection head_rows = HeadRows(heads);
  const auto tables = plan.tables.subspan(layer * plan.spans.size(), plan.spans.size());
  const Matrix residual(activations->residual.data(), rows, config_.hidden);
  const Matrix normed(activations->normed.data(), rows, config_.hidden);
  const Matrix q(activations->q.data(), rows, head_rows.count());
  const Matrix k(activations->k.data(), rows, kv_width);
  const Matrix v(activations->v.data(), rows, kv_width);
  const Matrix attended(activations->attention.data(), rows, head_rows.count());
  {
    PhaseTimer timer(&phases->norm);
    backend_->RmsNorm(
        {.x = residual, .weight = weights.attention_norm, .eps = config_.rms_eps, .out = normed});
  }
  {
    PhaseTimer timer(&phases->attention_projections);
    const std::array<MatMulTarget, 3> targets = {
        MatMulTarget{.weight = &weights.q,
                     .selection = head_rows,
                     .out = q,
                     .bias = HeadBias(weights.q_bias, head_rows)},
        MatMulTarget{.weight = &weights.k,
                     .selection = ChannelSelection::All(kv_width),
                     .out = k,
                     .bias = weights.k_bias},
        MatMulTarget{.weight = &weights.v,
                     .selection = ChannelSelection::All(kv_width),
                     .out = v,
                     .bias = weights.v_bias},
    };
    backend_->MatMul({.x = normed, .targets = targets});
  }
  {
    PhaseTimer timer(&phases->norm);
    NormHeads(weights.q_norm, q);
    NormHeads(weights.k_norm, k);
  }
  {
    PhaseTimer timer(&phases->attention);
    backend_->RopeAndStore(
        {.spans = plan.spans,
         .page_tables = tables,
         .q = q,
         .k = k,
         .v = v,
         .inverse_frequency = inverse_frequency_,
         .pairing = config_.rope_interleaved ? RopePairing::kInterleaved : RopePairing::kHalfSplit,
         .pool = pool});
    backend_->Attention({.spans = plan.spans,
                         .page_tables = tables,
                         .q = q,
                         .heads_kept = heads,
                         .heads = config_.heads,
                         .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                         .pool = pool,
                         .out = attended});
  }
  PhaseTimer timer(&phases->attention_projections);
  const std::array<MatMulTarget, 1> targets = {
      MatMulTarget{.weight = &weights.o, .selection = head_rows, .out = residual}};
  backend_->MatMul({.x = attended, .targets = targets, .output = MatMulArgs::Output::kAdd});
}

void Decoder::MlpBlock(int layer, const ChannelSelection& channels, int rows,
                       Activations* activations, PhaseTimes* phases) {
  if (channels.count() == 0) return;
  const Layer& weights = layers_[layer];
  const Matrix residual(activations->residual.data(), rows, config_.hidden);
  const Matrix normed(activations->normed.data(), rows, config_.hidden);
  const Matrix gate(activations->gate.data(), rows, channels.count());
  const Matrix up(activations->up.data(), rows, channels.count());
  {
    PhaseTimer timer(&phases->norm);
    backend_->RmsNorm(
        {.x = residual, .weight = weights.mlp_norm, .eps = config_.rms_eps, .out = normed});
  }
  PhaseTimer timer(&phases->mlp);
  backend_->GatedMlp({.x = normed,
                      .gate = weights.gate,
                      .up = weights.up,
                      .down = weights.down,
                      .selection = channels,
                      .gate_room = gate,
                      .up_room = up,
                      .out = residual});
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
  const std::array<MatMulTarget, 1> targets = {MatMulTarget{
      .weight = &head_, .selection = ChannelSelection::All(config_.vocabulary), .out = logits}};
  backend_->MatMul({.x = normed, .targets = targets});
}

}  // namespace espalier
