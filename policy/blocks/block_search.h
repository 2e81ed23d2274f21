// Which blocks to remove, without learning: greedy sequential importance (GSI, RAP's ranking;
// arXiv 2505.17138) and the plainer orders that it is compared with.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "policy/blocks/block_memory.h"

namespace espalier {

// Nats per token that the model without these blocks loses on a fixed text: its log perplexity.
// None: whoever measures wants to stop.
using BlockLoss = std::function<std::optional<double>(const BlockSet& removed)>;

// One removal.
struct BlockStep {
  int block = 0;
  double loss = 0;                  // BlockLoss of all removed so far, this one among them
  std::optional<double> confirmed;  // the same on more text
};
using BlockPath = std::vector<BlockStep>;

struct GsiOptions {
  // Blocks tried in a round: the best of the round before, and as many drawn of the others. The
  // first round tries all. Of ours: the paper tries all in each.
  int shortlist = 6;
  int drawn = 2;
  uint64_t seed = 1;
  // The best of a round are measured on more text, too, and by that the round is decided, for as
  // long as the model takes more than so many bytes: first removals are those that serve. Of ours.
  BlockLoss confirm;     // empty: none are
  int confirm_best = 3;  // of a round, at least 1
  int64_t confirm_above = 0;
};

// Removes, one after the other, the block of the least loss per byte freed,
//   argmin over b of (loss(R + b) - loss(R)) / freed(b; tokens),
// measured anew on the model as pruned so far (of the best by `confirm`), until it takes no more
// than `budget` bytes or no block is left. Budgets that are larger are met by a prefix of the path.
// `removable` says which blocks may leave. None: stopped.
std::optional<BlockPath> GreedyPath(const BlockMemory& memory, const BlockSet& removable,
                                    int64_t tokens, int64_t budget, const GsiOptions& options,
                                    const BlockLoss& loss);

// All removable blocks by their loss alone per byte freed, each measured on the whole model: what
// GSI is without its sequence. None: stopped.
std::optional<std::vector<int>> OneShotOrder(const BlockMemory& memory, const BlockSet& removable,
                                             int64_t tokens, const BlockLoss& loss);

// The shortest prefix of an order with which the model takes no more than `budget` bytes, without
// those of its blocks that then turn out to fit after all, the last removed tried first. Everything
// in the order if that is not enough.
BlockSet FitBudget(const BlockMemory& memory, std::span<const int> order, int64_t tokens,
                   int64_t budget);

}  // namespace espalier
