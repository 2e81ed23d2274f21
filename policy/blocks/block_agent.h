// RAP's agent: a double DQN that removes blocks, one after the other, until the model fits a budget
// (arXiv 2505.17138). The paper leaves out state, reward and network; they are ours, and written
// down here.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "policy/blocks/block_memory.h"
#include "policy/blocks/block_search.h"
#include "policy/training/double_dqn.h"

namespace espalier {

// What is to be served, and in how much memory.
struct BlockTask {
  int batch = 1;       // sequences
  int length = 1;      // tokens of each, prompt and output
  double share = 0.8;  // of what the whole model takes at this batch and length

  int64_t tokens() const { return int64_t{batch} * length; }
  int64_t Budget(const BlockMemory& memory) const;
};

// Batch and length of the published memory sweeps.
std::span<const BlockTask> RapScenarios();

// An episode is one task. Its state, of 2 L + 8 numbers:
//   removed or not, of each block; log2(batch) / 6; log2(length) / 13; budget / whole;
//   bytes / whole; the KV's share of the bytes; (bytes - budget) / whole; what the last removal
//   cost, nats per token; the share of all blocks that is removed.
// An action removes a block; the episode ends as soon as the model fits, which is what both
// published masks look like, so there is no action to stop.
QShape BlockAgentShape(const BlockMemory& memory);

struct BlockTrainingOptions {
  int episodes = 200;
  // The chance of another action than the best: from 1 to `last_epsilon`, linearly, over the first
  // `exploring` of the episodes. Half of those are the guide's, the others any.
  double last_epsilon = 0.05;
  double exploring = 0.6;
  double least_share = 0.5, most_share = 0.95;  // of budgets, uniformly
  int learns = 8;                               // batches a removal
  DqnOptions dqn;
};

// A removal is rewarded with -(rise of the loss) / 2, the last one with
// -0.05 (budget - bytes) / whole besides: with gamma 1 the return is minus half of what the log
// perplexity rises by. `guides` are removal orders by their tokens (GSI's); each is followed for
// episodes of their own first. None: stopped, by `loss` or by `progress`, which is called after
// each episode.
std::optional<QNetwork> TrainBlockAgent(
    const BlockMemory& memory, const BlockSet& removable,
    std::span<const std::pair<int64_t, std::vector<int>>> guides,
    const BlockTrainingOptions& options, const BlockLoss& loss,
    const std::function<bool(int done, int total)>& progress);

// What the agent removes, in order. None: stopped.
std::optional<std::vector<int>> AgentOrder(const BlockMemory& memory, const BlockSet& removable,
                                           const QNetwork& network, const BlockTask& task,
                                           const BlockLoss& loss);

}  // namespace espalier
