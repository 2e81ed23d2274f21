// `espalier train`: what the policies learn offline.
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/train_blocks.h"
#include "tools/train_serving.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

struct Options {
  std::string task;
  TrainBlocksOptions blocks;
  TrainServingOptions serving;
  int episodes = 0;
  uint64_t seed = 1;
  std::string out;
  std::optional<std::string> figures;
};

absl::Status Run(Options options) {
  const std::string figures =
      options.figures.value_or("build/figures/train-" + options.task + ".json");
  if (options.task == "rap") {
    TrainBlocksOptions& rap = options.blocks;
    if (options.episodes > 0) rap.episodes = options.episodes;
    rap.seed = options.seed;
    rap.out = options.out;
    rap.figures = figures;
    return TrainBlocks(rap);
  }
  TrainServingOptions& serve = options.serving;
  if (options.episodes > 0) serve.episodes = options.episodes;
  serve.seed = options.seed;
  serve.out = options.out;
  serve.figures = figures;
  return TrainServing(serve);
}

}  // namespace

void AddTrain(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "train", "Learn which blocks to remove for a budget, or when to serve at which rung");
  sub->add_option("--task", options->task, "What to learn")
      ->type_name("NAME")
      ->check(CLI::IsMember(std::vector<std::string>{"rap", "serve"}))
      ->required();
  sub->add_option("--episodes", options->episodes,
                  "To learn from; 0: 200 tasks of rap, 1200 simulated minutes of serve")
      ->type_name("COUNT")
      ->check(CLI::Range(0, 10'000'000))
      ->capture_default_str();
  sub->add_option("--seed", options->seed, "Of what is drawn: the same, the same outcome")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->capture_default_str();
  sub->add_option("--out", options->out,
                  "What to write: removal orders of rap, beside which what was measured lies as "
                  "PATH.losses, PATH.confirm-losses and PATH.other-losses, from which the same "
                  "command goes on; the network of serve")
      ->type_name("PATH")
      ->required();
  sub->add_option("--figures", options->figures,
                  "JSON file for the figures; empty: none. Default: build/figures/train-TASK.json")
      ->type_name("FILE");

  const auto rap = [&](const char* name, auto& value, const char* unit, int64_t least, int64_t most,
                       const char* description) {
    sub->add_option(name, value, description)
        ->type_name(unit)
        ->check(CLI::Range(least, most))
        ->capture_default_str()
        ->group("--task rap");
  };
  TrainBlocksOptions& blocks = options->blocks;
  sub->add_option("--text", blocks.texts,
                  "Text like the traffic to come: files or folders, each a kind, which count alike")
      ->type_name("PATH")
      ->group("--task rap");
  rap("--tokens", blocks.tokens, "TOKENS", 256, 10'000'000, "To measure losses on while searching");
  rap("--confirm-tokens", blocks.confirm_tokens, "TOKENS", 0, 10'000'000,
      "To decide on among the best, until 0.8 of the memory is left: a few say too little of "
      "losses; 0: by --tokens, too");
  rap("--held-out-tokens", blocks.held_out_tokens, "TOKENS", 256, 10'000'000,
      "Others, to measure what was found on");
  rap("--tasks", blocks.tasks, "COUNT", 2, 10'000, "Batch, length and budget to compare on");
  AddLocalModelOptions(*sub, &blocks.model);

  TrainServingOptions& serving = options->serving;
  AddSimulatedServerOptions(*sub, &serving.server);
  for (const char* name : {"--ladder", "--costs"}) sub->get_option(name)->required(false);
  const auto serve = [&](const char* name, auto& value, const char* unit, auto least, auto most,
                         const char* description) {
    sub->add_option(name, value, description)
        ->type_name(unit)
        ->check(CLI::Range(least, most))
        ->capture_default_str();
  };
  serve("--traces", serving.traces, "COUNT", 2, 100'000, "Simulated minutes to compare on");
  serve("--loss-weight", serving.loss_weight, "CALLS", 0.0, 100.0,
        "What a nat per token of told loss costs a call, in good calls");
  serve("--refusal-cost", serving.refusal_cost, "CALLS", 0.0, 100.0,
        "What a refused call costs, in good calls");
  sub->final_callback([options, action] {
    if (options->task == "rap") {
      if (options->blocks.model.model.empty()) throw CLI::RequiredError("--model");
      if (options->blocks.texts.empty()) throw CLI::RequiredError("--text");
    } else {
      if (options->serving.server.ladder.empty()) throw CLI::RequiredError("--ladder");
      if (options->serving.server.costs.empty()) throw CLI::RequiredError("--costs");
    }
    *action = [options] { return Run(*options); };
  });
}

}  // namespace espalier
