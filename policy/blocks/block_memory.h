// What a model takes without some of its blocks, weights and KV under one budget: the memory model
// of RAP (arXiv 2505.17138).
//
//   bytes(R; T) = fixed + sum over blocks b not in R of (weights of b + (b is attention ? k T : 0))
//
// with T the tokens that will be resident, of all sequences, and k the bytes of K and V of a token
// in a layer. The formula is ours, since the paper's text leaves it out; it gives the published
// bytes of LLaMA-2-7B and of both its published masks. Activations are not in it.
#pragma once

#include <bitset>
#include <cstdint>
#include <string>

namespace espalier {

// A layer's attention is block 2 * layer, its MLP block 2 * layer + 1.
inline constexpr int kMostBlocks = 256;
using BlockSet = std::bitset<kMostBlocks>;

inline int AttentionBlock(int layer) { return 2 * layer; }
inline int MlpBlock(int layer) { return 2 * layer + 1; }
inline int LayerOfBlock(int block) { return block / 2; }
inline bool IsAttention(int block) { return block % 2 == 0; }

// "attention 3 7-9, mlp 12"; "none".
std::string DescribeBlocks(const BlockSet& blocks);

struct BlockMemory {
  int layers = 0;               // at most kMostBlocks / 2
  int64_t fixed_bytes = 0;      // embedding, head, norms: what no mask frees
  int64_t attention_bytes = 0;  // weights of one block
  int64_t mlp_bytes = 0;
  int64_t kv_bytes = 0;  // K and V of one token in one layer

  int blocks() const { return 2 * layers; }
  // What leaves with `block` while `tokens` are resident.
  int64_t Freed(int block, int64_t tokens) const;
  int64_t Bytes(const BlockSet& removed, int64_t tokens) const;
  // Of the KV alone.
  int64_t KvBytes(const BlockSet& removed, int64_t tokens) const;
};

}  // namespace espalier
