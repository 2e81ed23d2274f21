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

BlockSet With(BlockSet removed, int block) { return removed.set(block); }

// A block that could be removed in a round.
struct Tried {
  double score = 0;  // loss per byte
  int block = 0;
  double loss = 0;
  std::optional<double> confirmed;
};

// Leaves the best of a round, with the scores that they have on more text, of which the model as
// it is loses `now`. False: stopped.
bool Confirm(const BlockMemory& memory, const BlockSet& removed, int64_t tokens, double now,
             const GsiOptions& options, std::vector<Tried>* round) {
  std::ranges::sort(*round, {}, [](const Tried& one) { return std::pair(one.score, one.block); });
  round->resize(std::min<size_t>(round->size(), std::max(1, options.confirm_best)));
  std::ranges::sort(*round, std::ranges::greater(), &Tried::block);  // as Descending
  for (Tried& one : *round) {
    one.confirmed = options.confirm(With(removed, one.block));
    if (!one.confirmed) return false;
    one.score = (*one.confirmed - now) / static_cast<double>(memory.Freed(one.block, tokens));
  }
  return true;
}

}  // namespace

std::optional<BlockPath> GreedyPath(const BlockMemory& memory, const BlockSet& removable,
                                    int64_t tokens, int64_t budget, const GsiOptions& options,
                                    const BlockLoss& loss) {
  BlockPath path;
  BlockSet removed;
  std::mt19937_64 random(options.seed);
  std::optional<double> now = loss(removed), confirmed;  // on the text of `confirm`
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
    std::vector<Tried> round;
    for (const int block : Descending(memory, tried)) {
      const std::optional<double> after = loss(With(removed, block));
      if (!after) return std::nullopt;
      const double freed = static_cast<double>(memory.Freed(block, tokens));
      round.push_back({.score = (*after - *now) / freed, .block = block, .loss = *after});
      const std::pair<double, int> score(round.back().score, block);
      std::erase_if(ranked, [&](const auto& entry) { return entry.second == block; });
      ranked.insert(std::ranges::lower_bound(ranked, score), score);
    }
    if (options.confirm && memory.Bytes(removed, tokens) > options.confirm_above) {
      if (!confirmed) confirmed = options.confirm(removed);
      if (!confirmed || !Confirm(memory, removed, tokens, *confirmed, options, &round))
        return std::nullopt;
    }
    const Tried& best = *std::ranges::min_element(
        round, {}, [](const Tried& one) { return std::pair(one.score, one.block); });
    removed.set(best.block);
    now = best.loss;
    if (best.confirmed) confirmed = best.confirmed;
    path.push_back({.block = best.block, .loss = best.loss, .confirmed = best.confirmed});
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
