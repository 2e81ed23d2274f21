// `espalier train`: what the policies learn offline.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/train_blocks.h"
#include "tools/value_checks.h"

namespace espalier {

void AddTrain(CLI::App& root, Action* action) {
  auto options = std::make_shared<TrainBlocksOptions>();
  auto task = std::make_shared<std::string>();
  CLI::App* sub =
      root.add_subcommand("train", "Learn which blocks to remove for a memory budget (rap)");
  sub->add_option("--task", *task, "What to learn")
      ->type_name("NAME")
      ->check(CLI::IsMember(std::vector<std::string>{"rap"}))
      ->required();
  sub->add_option("--text", options->texts,
                  "Text like the traffic to come: files or folders, each a kind, which count alike")
      ->type_name("PATH")
      ->required();
  sub->add_option("--tokens", options->tokens, "Tokens to measure losses on while searching")
      ->type_name("TOKENS")
      ->check(CLI::Range(256, 10'000'000))
      ->capture_default_str();
  sub->add_option("--held-out-tokens", options->held_out_tokens,
                  "Other tokens, to measure what was found on")
      ->type_name("TOKENS")
      ->check(CLI::Range(256, 10'000'000))
      ->capture_default_str();
  sub->add_option("--episodes", options->episodes, "Of the agent")
      ->type_name("COUNT")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  sub->add_option("--tasks", options->tasks, "Batch, length and budget to compare on")
      ->type_name("COUNT")
      ->check(CLI::Range(2, 10'000))
      ->capture_default_str();
  sub->add_option("--seed", options->seed, "Of the search, the agent and the tasks")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->capture_default_str();
  sub->add_option("--out", options->out,
                  "Removal orders to write; what was measured lies beside it as PATH.losses and "
                  "PATH.other-losses, from which the same command goes on")
      ->type_name("PATH")
      ->required();
  sub->add_option("--figures", options->figures, "JSON file for the figures")->type_name("FILE");
  AddLocalModelOptions(*sub, &options->model);
  sub->get_option("--model")->required();
  sub->final_callback(
      [options, task, action] { *action = [options] { return TrainBlocks(*options); }; });
}

}  // namespace espalier
