#include "engine/model/pruning_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/gguf_writer.h"
#include "engine/model/own_file.h"
#include "policy/ladder_file.h"

namespace espalier {
namespace {

constexpr std::string_view kArchitecture = "espalier-pruning";

constexpr std::string_view kUnfinishedKey = "espalier.unfinished";
constexpr const char* kWeight = "weight";
constexpr const char* kBias = "bias";

std::string RankingKey(int layer, SiteKind kind) {
  return fmt::format("espalier.{}.{}", kind == SiteKind::kChannels ? "ranking" : "heads", layer);
}

std::string RefitName(int layer, int count, const char* part) {
  return fmt::format("blk.{}.ffn_down.{}.{}", layer, count, part);
}

// A tensor of so many finite F32 values, where it lies.
absl::StatusOr<std::span<const float>> FloatsOf(const std::string& path, const StoredTensor& tensor,
                                                int count) {
  static_assert(alignof(FourBitGroup) <= 32 && alignof(float) <= 32);  // the format's alignment
  if (absl::Status status = CheckShape(path, tensor, BlockType::kF32, 1, count); !status.ok()) {
    return status;
  }
  const std::span values(reinterpret_cast<const float*>(tensor.data), static_cast<size_t>(count));
  if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
    return Mismatch(path, fmt::format("tensor {}", tensor.name), "finite values",
                    "an infinity or NaN");
  }
  return values;
}

std::string KeyMeanName(int layer) { return fmt::format("blk.{}.attn_k.mean", layer); }

}  // namespace

std::string LadderPathOf(std::string_view model) {
  while (model.size() > 1 && model.ends_with('/')) model.remove_suffix(1);
  if (model.ends_with(".gguf")) model.remove_suffix(5);
  return fmt::format("{}.ladder", model);
}

std::string ChannelsPathOf(std::string_view ladder) { return fmt::format("{}.gguf", ladder); }

absl::StatusOr<std::unique_ptr<PruningFile>> PruningFile::Open(const std::string& path,
                                                               const ModelFile& model) {
  absl::StatusOr<OwnFile> own = OwnFile::Open(path, kArchitecture, {}, model, FingerprintOf(model));
  if (!own.ok()) return own.status();
  const ModelConfig& config = model.config();
  std::unique_ptr<PruningFile> file(new PruningFile(std::move(own->file), config.sites()));
  GgufKeys keys(path, own->gguf);
  if (keys.Has(kUnfinishedKey)) file->unfinished_ = keys.String(kUnfinishedKey);
  for (int layer = 0; layer < config.layers; ++layer) {
    for (const SiteKind kind : {SiteKind::kChannels, SiteKind::kHeads}) {
      const std::string key = RankingKey(layer, kind);
      if (!keys.Has(key)) continue;
      const bool channels = kind == SiteKind::kChannels;
      const int width = channels ? config.channels : config.heads;
      std::vector<int32_t> ranking;
      for (const int64_t at : keys.Integers(key, width)) {
        ranking.push_back(at >= 0 && at < width ? static_cast<int32_t>(at) : -1);
      }
      if (!keys.status().ok()) return keys.status();
      if (!file->rankings_.SetRanking(layer, kind, std::move(ranking))) {
        return Mismatch(
            path, fmt::format("key {}", key),
            fmt::format("a permutation of {} {}", width, channels ? "channels" : "heads"),
            "something else");
      }
    }
  }
  for (const StoredTensor& tensor : own->gguf.tensors) {
    int layer = -1, count = 0;
    if (std::sscanf(tensor.name.c_str(), "blk.%d.attn_k.", &layer) == 1 && layer >= 0 &&
        layer < config.layers && tensor.name == KeyMeanName(layer)) {
      const absl::StatusOr<std::span<const float>> mean =
          FloatsOf(path, tensor, config.kv_heads * config.head_dim);
      if (!mean.ok()) return mean.status();
      file->key_means_[layer] = *mean;
      continue;
    }
    const bool bias = tensor.name.ends_with(kBias);
    if (std::sscanf(tensor.name.c_str(), "blk.%d.ffn_down.%d", &layer, &count) != 2 ||
        tensor.name != RefitName(layer, count, bias ? kBias : kWeight) || layer < 0 ||
        layer >= config.layers || count <= 0 || count > config.channels ||
        count % kQuantGroup != 0) {
      return Mismatch(
          path, fmt::format("tensor {}", Quoted(tensor.name)),
          fmt::format("blk.LAYER.ffn_down.COUNT.weight or .bias of this model's {} layers and {} "
                      "channels, in whole groups of {}",
                      config.layers, config.channels, kQuantGroup),
          "another name");
    }
    if (const std::string key = RankingKey(layer, SiteKind::kChannels); !keys.Has(key)) {
      return Mismatch(path, fmt::format("tensor {}", tensor.name),
                      fmt::format("key {} with it", key), "none");
    }
    Refit& refit = file->refits_[{layer, count}];
    if (!bias) {
      if (absl::Status status = CheckShape(path, tensor, BlockType::kQ4_1, config.hidden, count);
          !status.ok()) {
        return status;
      }
      refit.down = {reinterpret_cast<const FourBitGroup*>(tensor.data),
                    tensor.bytes / sizeof(FourBitGroup)};
      continue;
    }
    const absl::StatusOr<std::span<const float>> values = FloatsOf(path, tensor, config.hidden);
    if (!values.ok()) return values.status();
    refit.bias = *values;
  }
  return file;
}

Refit PruningFile::RefitOf(int layer, int count) const {
  const auto refit = refits_.find({layer, count});
  return refit == refits_.end() ? Refit() : refit->second;
}

PruningDataSelector::PruningDataSelector(const SiteWidths& widths, const PruningData* data)
    : rankings_(widths), data_(data) {
  for (size_t layer = 0; layer < data->layers.size(); ++layer) {  // none: stays natural
    rankings_.SetRanking(static_cast<int>(layer), SiteKind::kChannels, data->layers[layer].ranking);
    rankings_.SetRanking(static_cast<int>(layer), SiteKind::kHeads, data->layers[layer].heads);
  }
}

Refit PruningDataSelector::RefitOf(int layer, int count) const {
  const auto& refits = data_->layers[layer].refits;
  const auto refit = refits.find(count);
  return refit == refits.end() ? Refit() : Refit{refit->second.down, refit->second.bias};
}

absl::StatusOr<CalibratedLadder> OpenLadder(const std::string& path, const ModelFile& model) {
  const absl::StatusOr<MappedFile> text = MappedFile::Open(path);
  if (!text.ok()) return text.status();
  CalibratedLadder made;
  std::string error;
  if (!ParseLadder(text->bytes(), &made.ladder, &error)) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", path, error));
  }
  const SiteWidths widths = model.config().sites();
  const SiteWidths theirs = made.ladder.rung(0).prefill.widths();
  if (theirs != widths) {
    return Mismatch(path, "model",
                    fmt::format("{} layers, {} heads and {} channels", widths.layers, widths.heads,
                                widths.channels),
                    fmt::format("{}, {} and {}", theirs.layers, theirs.heads, theirs.channels));
  }
  bool narrows = false, int4_kv = false;
  for (int i = 0; i < made.ladder.size(); ++i) {
    int4_kv = int4_kv || made.ladder.rung(i).int4_kv;
    for (const KeepProfile* keep : {&made.ladder.rung(i).prefill, &made.ladder.rung(i).decode}) {
      for (int layer = 0; layer < widths.layers; ++layer) {
        const int channels = keep->kept(layer, SiteKind::kChannels);
        const int heads = keep->kept(layer, SiteKind::kHeads);
        narrows = narrows || (channels > 0 && channels < widths.channels) ||
                  (heads > 0 && heads < widths.heads);
      }
    }
  }
  // Keys in four bits do without their means, too.
  if (!narrows && !(int4_kv && std::filesystem::exists(ChannelsPathOf(path)))) {
    made.channels = std::make_unique<StaticSelector>(widths);
    return made;
  }
  absl::StatusOr<std::unique_ptr<PruningFile>> channels =
      PruningFile::Open(ChannelsPathOf(path), model);
  if (!channels.ok()) return channels.status();
  if (!(*channels)->unfinished().empty()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: of a calibration that is not done", ChannelsPathOf(path)));
  }
  made.refitted = (*channels)->has_refits();
  made.files = {&(*channels)->file()};
  made.channels = *std::move(channels);
  return made;
}

absl::Status WritePruningFile(const std::string& path, const ModelFile& model,
                              const PruningData& data, std::string_view unfinished) {
  GgufWriter writer;
  writer.Add("general.architecture", kArchitecture);
  writer.Add(kFingerprintKey, FingerprintOf(model));
  if (!unfinished.empty()) writer.Add(kUnfinishedKey, unfinished);
  for (size_t i = 0; i < data.layers.size(); ++i) {
    const PruningData::Layer& layer = data.layers[i];
    const int index = static_cast<int>(i);
    if (!layer.ranking.empty()) writer.Add(RankingKey(index, SiteKind::kChannels), layer.ranking);
    if (!layer.heads.empty()) writer.Add(RankingKey(index, SiteKind::kHeads), layer.heads);
    if (!layer.key_mean.empty()) {
      writer.AddTensor(KeyMeanName(index), BlockType::kF32, 1,
                       static_cast<int>(layer.key_mean.size()),
                       std::as_bytes(std::span(layer.key_mean)));
    }
    const int hidden = model.config().hidden;
    for (const auto& [count, refit] : layer.refits) {
      if (!refit.down.empty()) {
        writer.AddTensor(RefitName(index, count, kWeight), BlockType::kQ4_1, hidden, count,
                         std::as_bytes(std::span(refit.down)));
      }
      if (!refit.bias.empty()) {
        writer.AddTensor(RefitName(index, count, kBias), BlockType::kF32, 1, hidden,
                         std::as_bytes(std::span(refit.bias)));
      }
    }
  }
  return writer.Write(path);
}

}  // namespace espalier
