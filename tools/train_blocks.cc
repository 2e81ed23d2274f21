#include "tools/train_blocks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "engine/model/text/tokenizer.h"
#include "policy/blocks/block_agent.h"
#include "policy/blocks/block_orders.h"
#include "policy/blocks/block_search.h"
#include "tools/block_loss.h"
#include "tools/corpus.h"
#include "tools/figures.h"
#include "tools/interrupt.h"
#include "tools/machine.h"
#include "tools/progress.h"

namespace espalier {
namespace {

constexpr int kWindow = 128;
constexpr int kStepRows = 512;
constexpr double kLeastShare = 0.5;
constexpr double kConfirmShare = 0.8;  // of the memory, until which removals are confirmed

using Windows = std::vector<std::vector<int32_t>>;
using Orders = std::map<int64_t, std::vector<int>>;  // by resident tokens

// Windows to search on, others to judge by, and others to confirm by; kinds in turns.
struct Texts {
  Windows search, held_out, confirm;
};

absl::StatusOr<Texts> ReadTexts(const TrainBlocksOptions& options, const Tokenizer& tokenizer) {
  Texts texts;
  struct Part {
    Windows* windows;
    int64_t each;  // of a kind
  };
  const auto part = [&](Windows* windows, int64_t tokens) {
    const int64_t each = tokens / kWindow / static_cast<int64_t>(options.texts.size());
    return Part{windows, tokens == 0 ? 0 : std::max<int64_t>(1, each)};
  };
  const Part parts[] = {part(&texts.search, options.tokens),
                        part(&texts.held_out, options.held_out_tokens),
                        part(&texts.confirm, options.confirm_tokens)};
  int64_t needed = 0;
  for (const Part& one : parts) needed += one.each;
  absl::StatusOr<std::vector<TextKind>> read =
      ReadKinds(options.texts, tokenizer, kWindow, static_cast<int>(needed));
  if (!read.ok()) return read.status();
  int64_t next = 0;
  for (const Part& one : parts) {
    for (const int64_t end = next + one.each; next < end; ++next) {
      for (TextKind& kind : *read) {
        if (static_cast<int64_t>(kind.windows.size()) < needed) {
          return absl::InvalidArgumentError(
              fmt::format("{}: {} windows of {} tokens, {} are needed: --tokens, "
                          "--confirm-tokens, --held-out-tokens",
                          kind.name, kind.windows.size(), kWindow, needed));
        }
        one.windows->push_back(std::move(kind.windows[next]));
      }
    }
  }
  return texts;
}

// The error that ended a search.
absl::Status Stopped(const BlockLossTable& table) {
  if (!table.status().ok() && !absl::IsCancelled(table.status())) return table.status();
  return absl::CancelledError("interrupted; the same command goes on");
}

// ShortGPT's: whole layers, the least influential first.
std::vector<int> ByInfluence(std::span<const double> influence) {
  std::vector<int> layers(influence.size());
  std::iota(layers.begin(), layers.end(), 0);
  std::ranges::stable_sort(layers, {}, [&](int layer) { return influence[layer]; });
  std::vector<int> order;
  for (const int layer : layers) {
    order.push_back(AttentionBlock(layer));
    order.push_back(MlpBlock(layer));
  }
  return order;
}

// LayerDrop's (arXiv 1909.11556): as few whole layers as fit the budget, evenly spaced.
BlockSet EvenLayers(const BlockMemory& memory, int64_t tokens, int64_t budget) {
  BlockSet removed;
  for (int count = 1; count <= memory.layers && memory.Bytes(removed, tokens) > budget; ++count) {
    removed.reset();
    for (int i = 0; i < count; ++i) {
      const int layer = (2 * i + 1) * memory.layers / (2 * count);
      removed.set(AttentionBlock(layer)).set(MlpBlock(layer));
    }
  }
  return removed;
}

std::vector<int> Shuffled(const BlockMemory& memory, std::mt19937_64* random) {
  std::vector<int> order(memory.blocks());
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[(*random)() % i]);
  return order;
}

std::vector<BlockTask> HeldOutTasks(const TrainBlocksOptions& options) {
  std::mt19937_64 random(options.seed + 1000);
  std::vector<BlockTask> tasks;
  for (int i = 0; i < options.tasks; ++i) {
    BlockTask task = RapScenarios()[random() % RapScenarios().size()];
    task.share =
        kLeastShare + (0.95 - kLeastShare) * (static_cast<double>(random() >> 11) * 0x1p-53);
    tasks.push_back(task);
  }
  return tasks;
}

struct Spread {
  double mean = 0, error = 0;  // standard error of the mean
};

Spread SpreadOf(std::span<const double> values) {
  Spread spread;
  const auto count = static_cast<double>(values.size());
  if (values.empty()) return spread;
  spread.mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  double squares = 0;
  for (const double value : values) squares += (value - spread.mean) * (value - spread.mean);
  if (count > 1) spread.error = std::sqrt(squares / (count - 1) / count);
  return spread;
}

// A method's losses above the whole model's, nats per token, by task.
struct Judged {
  std::string name;
  std::string key;  // of figures
  std::function<std::optional<BlockSet>(const BlockTask&)> choose;
  std::vector<double> seen, held_out;
};

class Search {
 public:
  // `confirm`: null where nothing is confirmed.
  Search(const TrainBlocksOptions& options, const BlockMemory& memory, BlockLossTable* seen,
         BlockLossTable* confirm, BlockLossTable* held_out)
      : options_(options),
        memory_(memory),
        seen_(seen),
        confirm_(confirm),
        held_out_(held_out),
        tasks_(HeldOutTasks(options)),
        random_(options.seed) {
    for (int block = 0; block < memory.blocks(); ++block) removable_.set(block);
  }

  absl::Status Run() {
    if (absl::Status status = FindOrders(); !status.ok()) return status;
    if (absl::Status status = Train(); !status.ok()) return status;
    return Judge();
  }

  // Of the better: GSI's, or the agent's on the tightest budgets.
  absl::Status Write(const std::string& command);

 private:
  BlockLoss SeenLoss() {
    return [this](const BlockSet& removed) { return seen_->Loss(removed); };
  }

  absl::Status FindOrders() {
    std::set<int64_t> classes;
    for (const BlockTask& task : RapScenarios()) classes.insert(task.tokens());
    Progress bar("greedy importance");
    int64_t done = 0;
    for (const int64_t tokens : classes) {
      BlockTask task{.batch = 1, .length = static_cast<int>(tokens), .share = kConfirmShare};
      GsiOptions gsi{.seed = options_.seed, .confirm_above = task.Budget(memory_)};
      task.share = kLeastShare;
      // Measured sets are what takes the time; how many there will be is not known.
      const BlockLoss loss = [&](const BlockSet& removed) {
        bar.Update(done, static_cast<int64_t>(classes.size()));
        return seen_->Loss(removed);
      };
      if (confirm_ != nullptr) {
        gsi.confirm = [&](const BlockSet& removed) {
          bar.Update(done, static_cast<int64_t>(classes.size()));
          return confirm_->Loss(removed);
        };
      }
      const auto path = GreedyPath(memory_, removable_, tokens, task.Budget(memory_), gsi, loss);
      const auto one_shot = OneShotOrder(memory_, removable_, tokens, loss);
      if (!path || !one_shot) {
        return Stopped(confirm_ != nullptr && !confirm_->status().ok() ? *confirm_ : *seen_);
      }
      for (const BlockStep& step : *path) gsi_[tokens].push_back(step.block);
      paths_[tokens] = *path;
      one_shot_[tokens] = *one_shot;
      bar.Update(++done, static_cast<int64_t>(classes.size()));
    }
    influence_ = seen_->LayerInfluence();
    return influence_.empty() ? Stopped(*seen_) : absl::OkStatus();
  }

  absl::Status Train() {
    const std::vector<std::pair<int64_t, std::vector<int>>> guides(gsi_.begin(), gsi_.end());
    BlockTrainingOptions training{.episodes = options_.episodes};
    training.dqn.seed = options_.seed;
    Progress bar("the agent's episodes");
    agent_ = TrainBlockAgent(memory_, removable_, guides, training, SeenLoss(),
                             [&](int done, int total) {
                               bar.Update(done, total);
                               return !Interrupt::raised();
                             });
    return agent_ ? absl::OkStatus() : Stopped(*seen_);
  }

  std::optional<BlockSet> ByAgent(const BlockTask& task) {
    const auto order = AgentOrder(memory_, removable_, *agent_, task, SeenLoss());
    if (!order) return std::nullopt;
    return FitBudget(memory_, *order, task.tokens(), task.Budget(memory_));
  }

  BlockSet Fit(std::span<const int> order, const BlockTask& task) const {
    return FitBudget(memory_, order, task.tokens(), task.Budget(memory_));
  }

  absl::Status Judge();
  // Of the order for the fewest tokens, the removals that were confirmed: what each text says that
  // they lose.
  absl::StatusOr<std::string> FirstRemovals();

  const TrainBlocksOptions& options_;
  const BlockMemory memory_;
  BlockLossTable* const seen_;
  BlockLossTable* const confirm_;
  BlockLossTable* const held_out_;
  const std::vector<BlockTask> tasks_;
  std::mt19937_64 random_;
  BlockSet removable_;
  Orders gsi_, one_shot_;
  std::map<int64_t, BlockPath> paths_;  // gsi_'s
  std::vector<double> influence_;
  std::optional<QNetwork> agent_;
  std::vector<Judged> judged_;
  Spread agent_over_gsi_;  // difference of held-out losses
  bool agent_ships_ = false;
};

absl::Status Search::Judge() {
  judged_ = {
      {"greedy sequential (GSI)", "gsi",
       [&](const BlockTask& task) { return Fit(gsi_.at(task.tokens()), task); }},
      {"agent (double DQN)", "dqn", [&](const BlockTask& task) { return ByAgent(task); }},
      {"one-shot importance", "one_shot",
       [&](const BlockTask& task) { return Fit(one_shot_.at(task.tokens()), task); }},
      {"ShortGPT's order", "shortgpt",
       [&](const BlockTask& task) { return Fit(ByInfluence(influence_), task); }},
      {"layers evenly spaced", "layer_drop",
       [&](const BlockTask& task) {
         return EvenLayers(memory_, task.tokens(), task.Budget(memory_));
       }},
      {"random", "random",
       [&](const BlockTask& task) { return Fit(Shuffled(memory_, &random_), task); }},
  };
  const std::optional<double> seen = seen_->Loss({}), held_out = held_out_->Loss({});
  if (!seen || !held_out) return Stopped(seen ? *held_out_ : *seen_);
  Progress bar("losses on other text");
  int64_t done = 0;
  for (Judged& method : judged_) {
    for (const BlockTask& task : tasks_) {
      const std::optional<BlockSet> removed = method.choose(task);
      if (!removed) return Stopped(*seen_);
      const std::optional<double> loss = seen_->Loss(*removed), other = held_out_->Loss(*removed);
      if (!loss || !other) return Stopped(loss ? *held_out_ : *seen_);
      method.seen.push_back(*loss - *seen);
      method.held_out.push_back(*other - *held_out);
      bar.Update(++done, static_cast<int64_t>(judged_.size() * tasks_.size()));
    }
  }
  std::vector<double> differences;
  for (size_t i = 0; i < tasks_.size(); ++i) {
    differences.push_back(judged_[1].held_out[i] - judged_[0].held_out[i]);
  }
  agent_over_gsi_ = SpreadOf(differences);
  agent_ships_ = agent_over_gsi_.mean < -2 * agent_over_gsi_.error;
  return absl::OkStatus();
}

absl::StatusOr<std::string> Search::FirstRemovals() {
  if (confirm_ == nullptr) return "";
  const auto& [tokens, path] = *paths_.begin();
  const std::optional<double> seen = seen_->Loss({}), confirm = confirm_->Loss({}),
                              other = held_out_->Loss({});
  if (!seen || !confirm || !other) {
    return Stopped(!seen ? *seen_ : !confirm ? *confirm_ : *held_out_);
  }
  std::string table = fmt::format(
      "the greedy search's first removals for {} resident tokens, nats/token: on {} tokens "
      "searched on, on {} to confirm by, on {} others\n",
      tokens, seen_->tokens(), confirm_->tokens(), held_out_->tokens());
  BlockSet removed;
  for (const BlockStep& step : path) {
    if (!step.confirmed) break;
    removed.set(step.block);
    const std::optional<double> loss = held_out_->Loss(removed);
    if (!loss) return Stopped(*held_out_);
    table += fmt::format("{:>12} {:2}{:10.3f}{:10.3f}{:10.3f}\n",
                         IsAttention(step.block) ? "attention" : "MLP", LayerOfBlock(step.block),
                         step.loss - *seen, *step.confirmed - *confirm, *loss - *other);
  }
  return table;
}

absl::Status Search::Write(const std::string& command) {
  std::string table = fmt::format(
      "nats/token above the whole model, means of {} held-out (batch, length, budget), on {} other "
      "tokens\n{:26}{:>16}{:>16}{:>18}{:>12}\n",
      tasks_.size(), held_out_->tokens(), "", "budget >= 0.8", "below", "all", "searched on");
  nlohmann::ordered_json figures;
  for (const Judged& method : judged_) {
    std::vector<double> mild, harsh;
    for (size_t i = 0; i < tasks_.size(); ++i) {
      (tasks_[i].share >= 0.8 ? mild : harsh).push_back(method.held_out[i]);
    }
    const Spread all = SpreadOf(method.held_out);
    table += fmt::format("{:26}{:16.3f}{:16.3f}{:11.3f} +- {:.3f}{:12.3f}\n", method.name,
                         SpreadOf(mild).mean, SpreadOf(harsh).mean, all.mean, all.error,
                         SpreadOf(method.seen).mean);
    figures["rap_" + method.key] = all.mean;
  }
  table += fmt::format("the agent less GSI, task by task: {:+.3f} +- {:.3f}: the {}'s orders\n",
                       agent_over_gsi_.mean, agent_over_gsi_.error,
                       agent_ships_ ? "agent" : "greedy search");
  BlockOrders orders{.layers = memory_.layers};
  for (const auto& [tokens, order] : gsi_) {
    std::vector<int> better = order;
    if (agent_ships_) {
      const auto found = AgentOrder(
          memory_, removable_, *agent_,
          {.batch = 1, .length = static_cast<int>(tokens), .share = kLeastShare}, SeenLoss());
      if (!found) return Stopped(*seen_);
      better = *found;
    }
    orders.orders.push_back({.tokens = tokens, .blocks = better});
  }
  const absl::StatusOr<std::string> first = FirstRemovals();
  if (!first.ok()) return first.status();
  table += *first;
  table += fmt::format("{} sets of blocks measured on {} tokens, {} on {}, {} on the others\n",
                       seen_->known(), seen_->tokens(), confirm_ != nullptr ? confirm_->known() : 0,
                       confirm_ != nullptr ? confirm_->tokens() : 0, held_out_->known());
  std::ofstream file(options_.out);
  file << FormatBlockOrders(orders, command + "\n" + table);
  file.close();
  if (!file) return absl::UnavailableError(fmt::format("{}: cannot be written", options_.out));
  fmt::print("{}{}\n", table, options_.out);
  if (options_.figures.empty()) return absl::OkStatus();
  figures["rap_dqn_vs_greedy"] =
      SpreadOf(judged_[1].held_out).mean / SpreadOf(judged_[0].held_out).mean;
  figures["rap_sets_measured"] = seen_->known();
  return WriteFigures(options_.figures, std::move(figures));
}

}  // namespace

absl::Status TrainBlocks(const TrainBlocksOptions& options) {
  const Interrupt interrupt([] {});
  absl::StatusOr<LocalModel> model =
      LoadLocalModel(options.model, PagedTokens(kStepRows), kStepRows);
  if (!model.ok()) return model.status();
  const ModelConfig& config = model->file->config();
  if (config.layers > kMostBlocks / 2) {
    return absl::UnimplementedError(
        fmt::format("{} layers: {} are the most", config.layers, kMostBlocks / 2));
  }
  auto tokenizer = Tokenizer::Create(model->file->vocabulary());
  if (!tokenizer.ok()) return tokenizer.status();
  absl::StatusOr<Texts> texts = ReadTexts(options, **tokenizer);
  if (!texts.ok()) return texts.status();
  BlockLossTable seen(model->executor.get(), std::move(texts->search), kStepRows,
                      options.out + ".losses");
  absl::Status status = seen.Open();
  if (!status.ok()) return status;
  BlockLossTable held_out(model->executor.get(), std::move(texts->held_out), kStepRows,
                          options.out + ".other-losses");
  status = held_out.Open();
  if (!status.ok()) return status;
  std::optional<BlockLossTable> confirm;
  if (!texts->confirm.empty()) {
    confirm.emplace(model->executor.get(), std::move(texts->confirm), kStepRows,
                    options.out + ".confirm-losses");
    status = confirm->Open();
    if (!status.ok()) {
      return {status.code(), fmt::format("--confirm-tokens: {}", std::string(status.message()))};
    }
  }
  Search search(options, model->executor->block_memory(), &seen, confirm ? &*confirm : nullptr,
                &held_out);
  status = search.Run();
  if (!status.ok()) return status;
  return search.Write(fmt::format(
      "espalier train --task rap --text {} --tokens {} --confirm-tokens {} --held-out-tokens {} "
      "--episodes {} --tasks {} --seed {}\n{}, on {}, weights {}, kv {}",
      fmt::join(options.texts, " "), options.tokens, options.confirm_tokens,
      options.held_out_tokens, options.episodes, options.tasks, options.seed, config.name,
      MachineName(), model->executor->weight_types(), KvTypeName(model->kv)));
}

}  // namespace espalier
