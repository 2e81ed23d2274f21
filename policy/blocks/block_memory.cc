#include "policy/blocks/block_memory.h"

namespace espalier {

std::string DescribeBlocks(const BlockSet& blocks) {
  std::string text;
  for (const bool attention : {true, false}) {
    std::string layers;
    for (int block = attention ? 0 : 1; block < kMostBlocks; block += 2) {
      if (!blocks[block] || (block >= 2 && blocks[block - 2])) continue;
      int last = block;
      while (last + 2 < kMostBlocks && blocks[last + 2]) last += 2;
      layers.append(" ").append(std::to_string(LayerOfBlock(block)));
      if (last > block) layers.append("-").append(std::to_string(LayerOfBlock(last)));
    }
    if (layers.empty()) continue;
    if (!text.empty()) text.append(", ");
    text.append(attention ? "attention" : "mlp").append(layers);
  }
  return text.empty() ? "none" : text;
}

int64_t BlockMemory::Freed(int block, int64_t tokens) const {
  return IsAttention(block) ? attention_bytes + kv_bytes * tokens : mlp_bytes;
}

int64_t BlockMemory::Bytes(const BlockSet& removed, int64_t tokens) const {
  int64_t bytes = fixed_bytes;
  for (int block = 0; block < blocks(); ++block) {
    if (!removed[block]) bytes += Freed(block, tokens);
  }
  return bytes;
}

int64_t BlockMemory::KvBytes(const BlockSet& removed, int64_t tokens) const {
  int64_t bytes = 0;
  for (int layer = 0; layer < layers; ++layer) {
    if (!removed[AttentionBlock(layer)]) bytes += kv_bytes * tokens;
  }
  return bytes;
}

}  // namespace espalier
