#include "policy/blocks/block_search.h"

#include <algorithm>
#include <random>
#include <utility>

namespace espalier {
namespace {

// Blocks in descending order: whoever measures losses can keep what lies below the first block
// that differs from the set before.
std::vector<int> Descending(const BlockMemory& memory, const BlockSet& of) {
  std::vector<int> blocks;
  for (int block = memory.blocks() - 1; block >= 0; --block) {
    if (of[block]) blocks.push_back(block);
  }
  return blocks;
}

}  // namespace

std::optional<BlockPath> GreedyPath(const BlockMemory& memory, const BlockSet& removable,
                                    int64_t tokens, int64_t budget, const GsiOptions& options,
                                    const BlockLoss& loss) {
  BlockPath path;
  BlockSet removed;
  std::mt19937_64 random(options.seed);
  std::optional<double> now = loss(removed);
  if (!now) return std::nullopt;
  // By loss per byte, of the last round that tried them.
  std::vector<std::pair<double, int>> ranked;
  while (memory.Bytes(removed, tokens) > budget) {
    BlockSet tried = removable & ~removed;
    if (tried.none()) break;
    if (!ranked.empty()) {
      std::vector<int> others;
      tried.reset();
      for (const auto& [score, block] : ranked) {
        if (removed[block]) continue;
        if (static_cast<int>(tried.count()) < options.shortlist) {
          tried.set(block);
        } else {
          others.push_back(block);
        }
      }
      for (int i = 0; i < options.drawn && !others.empty(); ++i) {
        std::swap(others[random() % others.size()], others.back());
        tried.set(others.back());
        others.pop_back();
      }
    }
    double best_loss = 0;
    std::pair<double, int> best;
    bool found = false;
    for (const int block : Descending(memory, tried)) {
      BlockSet next = removed;
      next.set(block);
      const std::optional<double> after = loss(next);
      if (!after) return std::nullopt;
      const std::pair<double, int> score{
          (*after - *now) / static_cast<double>(memory.Freed(block, tokens)), block};
      std::erase_if(ranked, [&](const auto& entry) { return entry.second == block; });
      ranked.insert(std::ranges::lower_bound(ranked, score), score);
      if (!found || score < best) {
        found = true;
        best = score;
        best_loss = *after;
      }
    }
    removed.set(best.second);
    now = best_loss;
    path.push_back({.block = best.second, .loss = best_loss});
  }
  return path;
}

std::optional<std::vector<int>> OneShotOrder(const BlockMemory& memory, const BlockSet& removable,
                                             int64_t tokens, const BlockLoss& loss) {
  const std::optional<double> whole = loss({});
  if (!whole) return std::nullopt;
  std::vector<std::pair<double, int>> scores;
  for (const int block : Descending(memory, removable)) {
    const std::optional<double> without = loss(BlockSet().set(block));
    if (!without) return std::nullopt;
    scores.emplace_back((*without - *whole) / static_cast<double>(memory.Freed(block, tokens)),
                        block);
  }
  std::ranges::sort(scores);
  std::vector<int> order;
  for (const auto& [score, block] : scores) order.push_back(block);
  return order;
}

BlockSet FitBudget(const BlockMemory& memory, std::span<const int> order, int64_t tokens,
                   int64_t budget) {
  BlockSet removed;
  int64_t bytes = memory.Bytes(removed, tokens);
  size_t taken = 0;
  for (; taken < order.size() && bytes > budget; ++taken) {
    removed.set(order[taken]);
    bytes -= memory.Freed(order[taken], tokens);
  }
  for (size_t i = taken; i-- > 0;) {
    const int64_t freed = memory.Freed(order[i], tokens);
    if (bytes + freed > budget) continue;
    removed.reset(order[i]);
    bytes += freed;
  }
  return removed;
}

}  // namespace espalier
