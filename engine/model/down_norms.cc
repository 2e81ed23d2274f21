#include "engine/model/down_norms.h"

#include <fmt/format.h>

#include "engine/pruning/importance.h"

namespace espalier {
namespace {

absl::StatusOr<std::vector<float>> Read(const ModelFile& file, int layer, const char* name,
                                        int columns) {
  const int rows = file.config().hidden;
  const absl::StatusOr<const StoredTensor*> tensor =
      file.Find(fmt::format("blk.{}.{}.weight", layer, name), rows, columns);
  if (!tensor.ok()) return tensor.status();
  std::vector<float> values(static_cast<size_t>(rows) * columns);
  for (int n = 0; n < rows; ++n) {
    (*tensor)->ReadRow(n, values.data() + static_cast<size_t>(n) * columns);
  }
  return values;
}

}  // namespace

absl::StatusOr<std::vector<float>> ReadDown(const ModelFile& file, int layer) {
  return Read(file, layer, "ffn_down", file.config().channels);
}

absl::StatusOr<std::vector<float>> ReadO(const ModelFile& file, int layer) {
  return Read(file, layer, "attn_output", file.config().heads * file.config().head_dim);
}

absl::StatusOr<std::vector<std::vector<float>>> PpspNorms(const ModelFile& file, SiteKind kind) {
  const ModelConfig& config = file.config();
  const bool heads = kind == SiteKind::kHeads;
  std::vector<std::vector<float>> norms;
  for (int layer = 0; layer < config.layers; ++layer) {
    const absl::StatusOr<std::vector<float>> down =
        heads ? ReadO(file, layer) : ReadDown(file, layer);
    if (!down.ok()) return down.status();
    norms.push_back(DownNorms(Importance::kPpsp, *down, config.columns(kind)));
  }
  return norms;
}

}  // namespace espalier
