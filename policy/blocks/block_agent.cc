#include "policy/blocks/block_agent.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

namespace espalier {
namespace {

constexpr int kHidden = 128;
constexpr double kRewardScale = 0.5;
constexpr double kOverPruned = 0.05;

// A task being solved.
class Episode {
 public:
  Episode(const BlockMemory& memory, const BlockSet& removable, const BlockTask& task)
      : memory_(memory),
        removable_(removable),
        task_(task),
        whole_(static_cast<double>(memory.Bytes({}, task.tokens()))),
        budget_(task.Budget(memory)) {}

  const BlockSet& removed() const { return removed_; }
  bool done() const {
    return memory_.Bytes(removed_, task_.tokens()) <= budget_ || (removable_ & ~removed_).none();
  }

  std::vector<float> State() const {
    const auto bytes = static_cast<double>(memory_.Bytes(removed_, task_.tokens()));
    std::vector<float> state;
    for (int block = 0; block < memory_.blocks(); ++block) {
      state.push_back(removed_[block] ? 1.0F : 0.0F);
    }
    const auto kv = static_cast<double>(memory_.KvBytes(removed_, task_.tokens()));
    const auto budget = static_cast<double>(budget_);
    for (const double value :
         {std::log2(task_.batch) / 6, std::log2(task_.length) / 13, budget / whole_, bytes / whole_,
          kv / bytes, (bytes - budget) / whole_, last_rise_,
          static_cast<double>(removed_.count()) / memory_.blocks()}) {
      state.push_back(static_cast<float>(value));
    }
    return state;
  }

  std::vector<uint8_t> Allowed() const {
    std::vector<uint8_t> allowed(memory_.blocks());
    for (int block = 0; block < memory_.blocks(); ++block) {
      allowed[block] = removable_[block] && !removed_[block];
    }
    return allowed;
  }

  // Returns the reward.
  double Remove(int block, double rise) {
    removed_.set(block);
    last_rise_ = rise;
    double reward = -rise;
    if (done()) {
      const auto bytes = static_cast<double>(memory_.Bytes(removed_, task_.tokens()));
      reward -= kOverPruned * std::max(0.0, (static_cast<double>(budget_) - bytes) / whole_);
    }
    return kRewardScale * reward;
  }

 private:
  const BlockMemory& memory_;
  const BlockSet& removable_;
  BlockTask task_;
  double whole_;
  int64_t budget_;
  BlockSet removed_;
  double last_rise_ = 0;
};

using Guides = std::span<const std::pair<int64_t, std::vector<int>>>;

// The first block not removed yet of the guide for about as many tokens.
int Guided(Guides guides, int64_t tokens, std::span<const uint8_t> allowed) {
  const auto nearest = std::ranges::min_element(guides, {}, [&](const auto& guide) {
    return std::abs(std::log2(static_cast<double>(guide.first) / static_cast<double>(tokens)));
  });
  if (nearest == guides.end()) return -1;
  const auto block = std::ranges::find_if(nearest->second, [&](int b) { return allowed[b] != 0; });
  return block == nearest->second.end() ? -1 : *block;
}

int AnyOf(std::span<const uint8_t> allowed, std::mt19937_64* random) {
  auto left = (*random)() % static_cast<uint64_t>(std::ranges::count(allowed, 1));
  for (int action = 0;; ++action) {
    if (allowed[action] && left-- == 0) return action;
  }
}

}  // namespace

int64_t BlockTask::Budget(const BlockMemory& memory) const {
  return static_cast<int64_t>(share * static_cast<double>(memory.Bytes({}, tokens())));
}

std::span<const BlockTask> RapScenarios() {
  static constexpr BlockTask kScenarios[] = {
      {.batch = 1, .length = 4096}, {.batch = 2, .length = 2048}, {.batch = 4, .length = 2048},
      {.batch = 4, .length = 4096}, {.batch = 8, .length = 1024}, {.batch = 8, .length = 2048},
      {.batch = 8, .length = 4096}, {.batch = 16, .length = 512}, {.batch = 16, .length = 1024},
      {.batch = 16, .length = 2048}};
  return kScenarios;
}

QShape BlockAgentShape(const BlockMemory& memory) {
  return {.inputs = memory.blocks() + 8, .hidden = kHidden, .actions = memory.blocks()};
}

std::optional<QNetwork> TrainBlockAgent(const BlockMemory& memory, const BlockSet& removable,
                                        Guides guides, const BlockTrainingOptions& options,
                                        const BlockLoss& loss,
                                        const std::function<bool(int done, int total)>& progress) {
  DoubleDqn dqn(BlockAgentShape(memory), options.dqn);
  std::mt19937_64& random = dqn.random();
  const std::span<const BlockTask> scenarios = RapScenarios();
  const int shown = std::min(options.episodes / 4, static_cast<int>(4 * scenarios.size()));
  for (int number = 0; number < options.episodes; ++number) {
    BlockTask task = scenarios[random() % scenarios.size()];
    task.share = options.least_share + (options.most_share - options.least_share) *
                                           (static_cast<double>(random() >> 11) * 0x1p-53);
    const double explored = number / (options.exploring * options.episodes);
    const double epsilon = std::max(options.last_epsilon, 1 - explored);
    Episode episode(memory, removable, task);
    std::optional<double> now = loss({});
    while (now && !episode.done()) {
      Transition step{.state = episode.State()};
      const std::vector<uint8_t> allowed = episode.Allowed();
      int block = -1;
      if (number < shown) {
        block = Guided(guides, task.tokens(), allowed);
      } else if (dqn.Explores(epsilon)) {
        if (dqn.Explores(0.5)) block = Guided(guides, task.tokens(), allowed);
        if (block < 0) block = AnyOf(allowed, &random);
      }
      if (block < 0) block = dqn.Choose(step.state, allowed);
      BlockSet next = episode.removed();
      const std::optional<double> after = loss(next.set(block));
      if (!after) return std::nullopt;
      step.action = block;
      step.reward = static_cast<float>(episode.Remove(block, *after - *now));
      now = after;
      if (!episode.done()) {
        step.next_state = episode.State();
        step.next_allowed = episode.Allowed();
      }
      dqn.Remember(std::move(step));
      for (int i = 0; i < options.learns; ++i) dqn.Learn();
    }
    if (!now || !progress(number + 1, options.episodes)) return std::nullopt;
  }
  return dqn.network();
}

std::optional<std::vector<int>> AgentOrder(const BlockMemory& memory, const BlockSet& removable,
                                           const QNetwork& network, const BlockTask& task,
                                           const BlockLoss& loss) {
  Episode episode(memory, removable, task);
  std::vector<int> order;
  std::vector<float> hidden(network.shape().hidden), values(network.shape().actions);
  std::optional<double> now = loss({});
  while (now && !episode.done()) {
    network.Values(episode.State(), hidden, values);
    const std::vector<uint8_t> allowed = episode.Allowed();
    int best = -1;
    for (int block = 0; block < memory.blocks(); ++block) {
      if (allowed[block] && (best < 0 || values[block] > values[best])) best = block;
    }
    BlockSet next = episode.removed();
    const std::optional<double> after = loss(next.set(best));
    if (!after) return std::nullopt;
    episode.Remove(best, *after - *now);
    now = after;
    order.push_back(best);
  }
  return now ? std::optional(order) : std::nullopt;
}

}  // namespace espalier
