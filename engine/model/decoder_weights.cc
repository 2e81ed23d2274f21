// Where a decoder's weights come from: loaded from a file, gathered and refitted for rungs, and
// given back to the device while no rung that is served needs them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>

#include "engine/model/decoder.h"
#include "engine/model/files/checksum.h"
#include "engine/model/files/quant_blocks.h"
#include "engine/scheduling/invariant.h"
#include "fmt/format.h"
#include "kernels/sparse24.h"

namespace espalier {
namespace {

WeightSource SourceOf(const StoredTensor& tensor) {
  WeightSource source = {.read_values = [&tensor](int n, float* dst) { tensor.ReadRow(n, dst); }};
  if (tensor.type == BlockType::kQ4_1) {
    static_assert(sizeof(FourBitGroup) == 20);  // of a block
    source.read_groups = [&tensor](int n, FourBitGroup* dst) {
      std::memcpy(dst, tensor.row(n), tensor.cols / kQuantGroup * sizeof(FourBitGroup));
    };
  }
  return source;
}

// Reads tensors of one file onto one backend and counts them for the progress bar. After the first
// fault, which stays in status(), nothing more is read.
class Loader {
 public:
  Loader(const ModelFile& file, Backend* backend, WeightPlan plan, int total,
         const std::function<bool(int, int)>& progress)
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
    absl::StatusOr<Weight> weight =
        backend_->UploadWeight(TypeFor(*tensor), layout, output_rows ? outputs : depth,
                               output_rows ? depth : outputs, SourceOf(*tensor));
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
    if (progress_ && !progress_(++done_, total_)) {
      status_ = absl::CancelledError(fmt::format("{}: loading was given up", file_.path()));
    }
  }

  const ModelFile& file_;
  Backend* backend_;
  WeightPlan plan_;
  int done_ = 0;
  int total_;
  const std::function<bool(int, int)>& progress_;
  absl::Status status_;
  uint64_t bytes_ = 0;
};

WeightSource SourceOf(std::span<const FourBitGroup> groups, int channels) {
  const int64_t per_output = channels / kQuantGroup;
  const auto output = [=](int n) { return groups.subspan(n * per_output, per_output); };
  return {.read_values =
              [=](int n, float* dst) {
                Dequantize(BlockType::kQ4_1, std::as_bytes(output(n)).data(), channels, dst);
              },
          .read_groups = [=](int n, FourBitGroup* dst) { std::ranges::copy(output(n), dst); }};
}

// `down` [channels, hidden] of a selector's groups: as they are, or as floats if the others are.
absl::StatusOr<Weight> UploadRefit(std::span<const FourBitGroup> groups, const Weight& loaded,
                                   int channels, Backend* backend) {
  return backend->UploadWeight(IsFloat(loaded.type) ? loaded.type : WeightType::kInt4,
                               WeightLayout::kInputRows, channels, loaded.cols,
                               SourceOf(groups, channels));
}

// Of a weight's packed values. Weights that come back are held to what they were.
uint64_t ChecksumOf(const Weight& weight) {
  Checksum checksum;
  checksum.Add(weight.blocks, weight.bytes);
  return checksum.value();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Load(
    const ModelFile& file, Backend* backend, WeightPlan plan,
    const std::function<bool(int, int)>& progress) {
  const ModelConfig& config = file.config();
  std::unique_ptr<Decoder> model(new Decoder(config, backend));
  const int total = (9 + 3 * config.qkv_bias + 2 * config.qk_norm) * config.layers +
                    (config.tied_embeddings ? 2 : 3);
  Loader load(file, backend, plan, total, progress);
  const int query_width = config.heads * config.head_dim;
  const int kv_width = config.kv_heads * config.head_dim;

  load.OutputRows("token_embd.weight", config.vocabulary, config.hidden, &model->embedding_);
  const auto part_of = [](int layer) {
    return [layer](const char* part) { return fmt::format("blk.{}.{}.weight", layer, part); };
  };
  for (int i = 0; i < config.layers; ++i) {
    Layer& layer = model->layers_[i];
    const auto name = part_of(i);
    load.Vector(name("attn_norm"), config.hidden, &layer.attention_norm);
    load.OutputRows(name("attn_q"), query_width, config.hidden, &layer.q);
    load.OutputRows(name("attn_k"), kv_width, config.hidden, &layer.k);
    load.OutputRows(name("attn_v"), kv_width, config.hidden, &layer.v);
    load.InputRows(name("attn_output"), config.hidden, query_width, &layer.o);
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
  // One after the other in memory: they may leave it together, and whole huge pages with them.
  for (int i = 0; i < config.layers; ++i) {
    Layer& layer = model->layers_[i];
    const auto name = part_of(i);
    load.Vector(name("ffn_norm"), config.hidden, &layer.mlp_norm);
    load.OutputRows(name("ffn_gate"), config.channels, config.hidden, &layer.gate);
    load.OutputRows(name("ffn_up"), config.channels, config.hidden, &layer.up);
    load.InputRows(name("ffn_down"), config.hidden, config.channels, &layer.down);
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

BlockMemory Decoder::block_memory() const {
  int64_t attention = 0, mlp = 0;
  for (const Layer& layer : layers_) {
    attention +=
        static_cast<int64_t>(layer.q.bytes + layer.k.bytes + layer.v.bytes + layer.o.bytes);
    mlp += static_cast<int64_t>(layer.gate.bytes + layer.up.bytes + layer.down.bytes);
  }
  return {.layers = config_.layers,
          .fixed_bytes = static_cast<int64_t>(weight_bytes_) - attention - mlp,
          .attention_bytes = attention / config_.layers,
          .mlp_bytes = mlp / config_.layers};
}

std::string Decoder::weight_types() const {
  bool used[4] = {}, sparse24 = true;
  used[static_cast<int>(head_.type)] = used[static_cast<int>(embedding_.type)] = true;
  for (const Layer& layer : layers_) {
    for (const Weight* weight :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      used[static_cast<int>(weight->type)] = true;
      sparse24 &= weight->sparse24;
    }
  }
  std::string names;
  for (const WeightType type :
       {WeightType::kInt4, WeightType::kInt8, WeightType::kBf16, WeightType::kF32}) {
    if (!used[static_cast<int>(type)]) continue;
    names += fmt::format("{}{}", names.empty() ? "" : "+", WeightTypeName(type));
  }
  return names + (sparse24 ? ", 2:4" : "");
}

int Decoder::channel_group() const {
  const auto sparse24 = [](const Layer& layer) { return layer.down.sparse24; };
  return std::ranges::all_of(layers_, sparse24) ? kSparseGroup : 1;
}

absl::Status Decoder::MakePanels(const Ladder& ladder, const ChannelSelector& selector) {
  std::vector<Panels> made(config_.layers);
  for (int layer = 0; layer < config_.layers; ++layer) {
    std::set<int> heads, channels;  // what rungs keep of some
    for (int i = 0; i < ladder.size(); ++i) {
      for (const KeepProfile* keep : {&ladder.rung(i).prefill, &ladder.rung(i).decode}) {
        const int kept_heads = keep->kept(layer, SiteKind::kHeads);
        const int kept_channels = keep->kept(layer, SiteKind::kChannels);
        if (kept_channels % kQuantGroup != 0 && kept_channels != config_.channels) {
          return absl::InvalidArgumentError(
              fmt::format("rung {}, layer {}: keeps {} channels; expected a multiple of {}, or {}",
                          i, layer, kept_channels, kQuantGroup, config_.channels));
        }
        if (kept_heads > 0 && kept_heads < config_.heads) heads.insert(kept_heads);
        if (kept_channels > 0 && kept_channels < config_.channels) channels.insert(kept_channels);
      }
    }
    made[layer].head_counts.assign(heads.begin(), heads.end());
    const std::span<const int32_t> ranking = selector.Ranking(layer, SiteKind::kHeads);
    absl::Status status =
        MakeHeadPanels(layer, ranking.first(heads.empty() ? 0 : *heads.rbegin()), &made[layer]);
    status.Update(MakeChannelPanels(layer, selector, channels, &made[layer]));
    const std::span<const float> key_mean = selector.KeyMean(layer);
    made[layer].key_mean.assign(key_mean.begin(), key_mean.end());
    if (!status.ok()) {
      return absl::Status(status.code(),
                          fmt::format("panels of layer {}: {}", layer, status.ToString()));
    }
  }
  panels_ = std::move(made);
  ListReleasable(ladder);
  panel_bytes_ = 0;
  for (const Panels& panels : panels_) {
    for (const Weight* weight : {&panels.q, &panels.o, &panels.gate, &panels.up, &panels.down}) {
      panel_bytes_ += weight->bytes;
    }
    for (const auto& [count, refitted] : panels.refitted) {
      if (refitted.down.has_value()) panel_bytes_ += refitted.down->bytes;
    }
  }
  return absl::OkStatus();
}

absl::Status Decoder::Gather(std::initializer_list<std::pair<const Weight*, Weight*>> weights,
                             std::span<const int32_t> rows) const {
  for (const auto& [from, to] : weights) {
    const absl::Status status = backend_->GatherRows(*from, rows, to);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Decoder::MakeHeadPanels(int layer, std::span<const int32_t> heads,
                                     Panels* panels) const {
  if (heads.empty()) return absl::OkStatus();
  const Layer& weights = layers_[layer];
  panels->heads.assign(heads.begin(), heads.end());
  panels->q_bias.clear();
  std::vector<int32_t> rows;  // head_dim of q and o for each head
  for (const int32_t head : heads) {
    for (int d = 0; d < config_.head_dim; ++d) rows.push_back(head * config_.head_dim + d);
  }
  for (const int32_t row : rows) {
    if (!weights.q_bias.empty()) panels->q_bias.push_back(weights.q_bias[row]);
  }
  return Gather({{&weights.q, &panels->q}, {&weights.o, &panels->o}}, rows);
}

absl::Status Decoder::MakeChannelPanels(int layer, const ChannelSelector& selector,
                                        const std::set<int>& counts, Panels* panels) const {
  if (counts.empty()) return absl::OkStatus();
  const Layer& weights = layers_[layer];
  const std::span<const int32_t> ranking = selector.Ranking(layer, SiteKind::kChannels);
  panels->channels.assign(ranking.begin(), ranking.end());
  panels->counts.assign(counts.begin(), counts.end());
  absl::Status status =
      Gather({{&weights.gate, &panels->gate}, {&weights.up, &panels->up}}, panels->channels);
  int widest = 0;  // of the counts that share one panel
  for (const int count : counts) {
    const Refit refit = selector.RefitOf(layer, count);
    if (!refit.bias.empty()) {
      panels->refitted[count].bias.assign(refit.bias.begin(), refit.bias.end());
    }
    if (refit.down.empty()) {
      widest = std::max(widest, count);
      continue;
    }
    absl::StatusOr<Weight> down = UploadRefit(refit.down, weights.down, count, backend_);
    if (!down.ok()) return down.status();
    panels->refitted[count].down = *std::move(down);
  }
  if (widest > 0) {
    status.Update(Gather({{&weights.down, &panels->down}}, ranking.first(widest)));
  }
  return status;
}

absl::Status Decoder::ReplaceWeight(int layer, std::string_view part, ConstMatrix values,
                                    WeightPlan plan) {
  Invariant(panel_bytes_ == 0 && sources_.model == nullptr,
            "{} of layer {} has panels or a source, which would be of old values", part, layer);
  Layer& own = layers_[layer];
  using Named = std::pair<std::string_view, Weight*>;
  const Named named[] = {{"attn_q", &own.q},      {"attn_k", &own.k},      {"attn_v", &own.v},
                         {"attn_output", &own.o}, {"ffn_gate", &own.gate}, {"ffn_up", &own.up},
                         {"ffn_down", &own.down}};
  const auto* const found = std::ranges::find(named, part, &Named::first);
  Invariant(found != std::end(named), "a layer has no {}", part);
  Weight* const weight = found->second;
  const bool output_rows = weight->layout == WeightLayout::kOutputRows;
  Invariant(values.rows == (output_rows ? weight->rows : weight->cols) &&
                values.cols == (output_rows ? weight->cols : weight->rows),
            "{} of [{}, {}] for one of [{}, {}]", part, values.rows, values.cols, weight->rows,
            weight->cols);
  absl::StatusOr<Weight> made = backend_->UploadWeight(
      TypeOf(plan, BlockType::kF32, /*of_a_layer=*/true), weight->layout, weight->rows,
      weight->cols,
      {.read_values = [&](int n, float* dst) { std::copy_n(values.row(n), values.cols, dst); }});
  if (!made.ok()) return made.status();
  weight_bytes_ += made->bytes - weight->bytes;
  *weight = *std::move(made);
  return absl::OkStatus();
}

void Decoder::KeepSources(WeightSources sources) { sources_ = std::move(sources); }

void Decoder::ListReleasable(const Ladder& ladder) {
  releasable_.clear();
  for (int layer = 0; layer < config_.layers; ++layer) {
    RungSet attention = 0, whole = 0, narrow = 0;  // rungs that need what
    std::map<int, RungSet> counts;
    for (int i = 0; i < ladder.size(); ++i) {
      const RungSet rung = RungSet{1} << i;
      if (ladder.rung(i).HoldsKv(layer)) attention |= rung;
      for (const KeepProfile* keep : {&ladder.rung(i).prefill, &ladder.rung(i).decode}) {
        const int kept = keep->kept(layer, SiteKind::kChannels);
        if (kept == config_.channels) {
          whole |= rung;
        } else if (kept > 0) {
          narrow |= rung;
          counts[kept] |= rung;
        }
      }
    }
    using Origin = Releasable::Origin;
    Layer& own = layers_[layer];
    Panels& panels = panels_[layer];
    const auto add = [&](Origin origin, Weight* weight, RungSet users, Releasable more = {}) {
      if (weight->blocks == nullptr) return;  // not made
      more.layer = layer;
      more.origin = origin;
      more.weight = weight;
      more.users = users;
      releasable_.push_back(more);
    };
    add(Origin::kFile, &own.q, attention, {.name = "attn_q"});
    add(Origin::kFile, &own.k, attention, {.name = "attn_k"});
    add(Origin::kFile, &own.v, attention, {.name = "attn_v"});
    add(Origin::kFile, &own.o, attention, {.name = "attn_output"});
    const size_t gate = releasable_.size();
    add(Origin::kFile, &own.gate, whole, {.name = "ffn_gate"});
    add(Origin::kFile, &own.up, whole, {.name = "ffn_up"});
    add(Origin::kFile, &own.down, whole, {.name = "ffn_down"});
    add(Origin::kPanel, &panels.gate, narrow, {.from = gate});
    add(Origin::kPanel, &panels.up, narrow, {.from = gate + 1});
    RungSet shared = 0;  // the one `down` of those without their own
    for (const auto& [count, users] : counts) {
      const auto own_down = panels.refitted.find(count);
      if (own_down == panels.refitted.end() || !own_down->second.down.has_value()) {
        shared |= users;
      } else {
        add(Origin::kRefit, &*own_down->second.down, users, {.count = count});
      }
    }
    add(Origin::kPanel, &panels.down, shared, {.from = gate + 2});
  }
}

uint64_t Decoder::ReleasableBytes(RungSet served) const {
  if (!may_release()) return 0;
  uint64_t bytes = 0;
  for (const Releasable& each : releasable_) {
    if ((each.users & served) == 0) bytes += each.weight->releasable;
  }
  return bytes;
}

bool Decoder::SourcesUnchanged() const {
  return std::ranges::all_of(sources_.files, &MappedFile::Unchanged);
}

absl::Status Decoder::FitLayer(int layer, RungSet served) {
  const auto first = std::ranges::lower_bound(releasable_, layer, {}, &Releasable::layer);
  const auto last = std::ranges::upper_bound(releasable_, layer, {}, &Releasable::layer);
  for (auto each = first; each != last; ++each) {
    if ((each->users & served) == 0 || each->weight->blocks != nullptr) continue;
    if (each->origin == Releasable::Origin::kPanel) {
      // What it is gathered from may go again below.
      Releasable& from = releasable_[each->from];
      if (from.weight->blocks == nullptr) {
        if (absl::Status status = Refill(&from); !status.ok()) return status;
      }
    }
    if (absl::Status status = Refill(&*each); !status.ok()) return status;
  }
  for (auto each = first; each != last; ++each) {
    if ((each->users & served) != 0 || each->weight->blocks == nullptr) continue;
    if (each->checksum == 0) each->checksum = ChecksumOf(*each->weight) | 1;
    released_bytes_ += each->weight->releasable;
    ++released_;
    backend_->ReleaseWeight(each->weight);
  }
  return absl::OkStatus();
}

absl::Status Decoder::Refill(Releasable* part) {
  Weight* const weight = part->weight;
  Panels& panels = panels_[part->layer];
  std::string what;
  absl::Status status;
  switch (part->origin) {
    case Releasable::Origin::kFile: {
      what = fmt::format("{}: tensor blk.{}.{}.weight", sources_.model->path(), part->layer,
                         part->name);
      const bool output_rows = weight->layout == WeightLayout::kOutputRows;
      const absl::StatusOr<const StoredTensor*> tensor = sources_.model->Find(
          fmt::format("blk.{}.{}.weight", part->layer, part->name),
          output_rows ? weight->rows : weight->cols, output_rows ? weight->cols : weight->rows);
      status = tensor.ok() ? backend_->RefillWeight(SourceOf(**tensor), weight) : tensor.status();
      break;
    }
    case Releasable::Origin::kPanel:
      what = fmt::format("panel of layer {}", part->layer);
      status = backend_->GatherRows(*releasable_[part->from].weight,
                                    std::span(panels.channels).first(weight->rows), weight);
      break;
    case Releasable::Origin::kRefit:
      what = fmt::format("`down` of layer {} for {} channels", part->layer, part->count);
      status = backend_->RefillWeight(
          SourceOf(sources_.channels->RefitOf(part->layer, part->count).down, part->count), weight);
      break;
  }
  if (status.ok() && (ChecksumOf(*weight) | 1) != part->checksum) {
    status = absl::DataLossError("the values are not those that were released");
  }
  if (!status.ok()) {
    return absl::Status(status.code(), fmt::format("{}: {}", what, status.ToString()));
  }
  released_bytes_ -= weight->releasable;
  --released_;
  return absl::OkStatus();
}

}  // namespace espalier
