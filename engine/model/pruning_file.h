// What calibration found of a model: rankings of its channels and `down` refitted to those that
// stay. A GGUF file beside the ladder, so that tools for that format can look into it:
//
//   espalier.fingerprint             string, FingerprintOf(model)
//   espalier.ranking.LAYER           int32 array, the layer's channels, best first
//   espalier.heads.LAYER             int32 array, its query heads, best first
//   blk.LAYER.ffn_down.COUNT.weight  Q4_1 [hidden, COUNT]: `down` of the ranking's first COUNT
//   blk.LAYER.ffn_down.COUNT.bias    F32 [hidden]: what is added to what that gives
//   blk.LAYER.attn_k.mean            F32 [kv_heads * head_dim]: the mean of rotated keys
//
//   espalier.unfinished              string, of a calibration that is not done: what it is of
//
// Layers that no rung narrows are left out; so are weights or biases that stay as loaded.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/files/model_file.h"
#include "engine/pruning/channel_selector.h"
#include "policy/ladder.h"

namespace espalier {

class PruningFile final : public ChannelSelector {
 public:
  // Maps and checks the file: rankings are permutations of the model's channels, refits have its
  // hidden size and whole groups, values are finite. InvalidArgument, with file and key or tensor,
  // if not, or if the file is of another model.
  static absl::StatusOr<std::unique_ptr<PruningFile>> Open(const std::string& path,
                                                           const ModelFile& model);

  std::span<const int32_t> Ranking(int layer, SiteKind kind) const override {
    return rankings_.Ranking(layer, kind);
  }
  Refit RefitOf(int layer, int count) const override;
  std::span<const float> KeyMean(int layer) const override {
    const auto mean = key_means_.find(layer);
    return mean == key_means_.end() ? std::span<const float>() : mean->second;
  }
  const MappedFile& file() const { return file_; }
  bool has_refits() const { return !refits_.empty(); }
  const std::string& unfinished() const { return unfinished_; }

 private:
  PruningFile(MappedFile file, const SiteWidths& widths)
      : file_(std::move(file)), rankings_(widths) {}

  MappedFile file_;
  StaticSelector rankings_;
  std::string unfinished_;
  std::map<std::pair<int, int>, Refit> refits_;  // (layer, count)
  std::map<int, std::span<const float>> key_means_;
};

// A ladder and the channels that its rungs narrow to.
struct CalibratedLadder {
  Ladder ladder;
  std::shared_ptr<const ChannelSelector> channels;
  std::vector<const MappedFile*> files;  // that the channels' refits lie in
  bool refitted = false;                 // its losses are those of refitted weights
};

// Reads both. NotFound or InvalidArgument, with path and line or tensor. A ladder that only drops
// whole blocks needs no channels beside it.
absl::StatusOr<CalibratedLadder> OpenLadder(const std::string& path, const ModelFile& model);

struct PruningData {
  struct Layer {
    std::vector<int32_t> ranking;        // of channels; empty: never narrowed
    std::vector<int32_t> heads;          // the same of query heads
    std::map<int, RefittedDown> refits;  // by count
    std::vector<float> key_mean;         // empty: not known
  };
  std::vector<Layer> layers;
};

// Data before they are a file. `data` must outlive it; refits may still be added.
class PruningDataSelector final : public ChannelSelector {
 public:
  PruningDataSelector(const SiteWidths& widths, const PruningData* data);

  std::span<const int32_t> Ranking(int layer, SiteKind kind) const override {
    return rankings_.Ranking(layer, kind);
  }
  Refit RefitOf(int layer, int count) const override;
  std::span<const float> KeyMean(int layer) const override {
    if (layer >= static_cast<int>(data_->layers.size())) return {};
    return data_->layers[layer].key_mean;
  }

 private:
  StaticSelector rankings_;
  const PruningData* data_;
};

// Where a model's ladder is looked for and written if nobody says: the model's path, without
// ".gguf" or a slash at its end, and ".ladder".
std::string LadderPathOf(std::string_view model);
// Of the ladder's channels: its path and ".gguf".
std::string ChannelsPathOf(std::string_view ladder);

// Through a file beside it, so that none is ever half written. Errors name the path.
absl::Status WritePruningFile(const std::string& path, const ModelFile& model,
                              const PruningData& data, std::string_view unfinished = "");

}  // namespace espalier
