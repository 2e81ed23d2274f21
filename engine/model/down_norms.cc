#include "engine/model/down_norms.h"

#include <fmt/format.h>

#include "engine/pruning/importance.h"

namespace espalier {

absl::StatusOr<std::vector<float>> ReadDown(const ModelFile& file, int layer) {
  const ModelConfig& config = file.config();
  const absl::StatusOr<const StoredTensor*> tensor =
      file.Find(fmt::format("blk.{}.ffn_down.weight", layer), config.hidden, config.channels);
  if (!tensor.ok()) return tensor.status();
  std::vector<float> down(static_cast<size_t>(config.hidden) * config.channels);
  for (int n = 0; n < config.hidden; ++n) {
    (*tensor)->ReadRow(n, down.data() + static_cast<size_t>(n) * config.channels);
  }
  return down;
}

absl::StatusOr<std::vector<std::vector<float>>> PpspNorms(const ModelFile& file) {
  std::vector<std::vector<float>> norms;
  for (int layer = 0; layer < file.config().layers; ++layer) {
    const absl::StatusOr<std::vector<float>> down = ReadDown(file, layer);
    if (!down.ok()) return down.status();
    norms.push_back(DownNorms(Importance::kPpsp, *down, file.config().channels));
  }
  return norms;
}

}  // namespace espalier
