// `espalier train --task rap`: which blocks to remove for a memory budget, by greedy importance and
// by RAP's agent, and which of the two is better.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "tools/local_model.h"

namespace espalier {

struct TrainBlocksOptions {
  LocalModelOptions model;
  std::vector<std::string> texts;
  int64_t tokens = 2048;           // that losses are measured on while searching
  int64_t confirm_tokens = 32768;  // that the first removals are decided on; 0: as the rest
  int64_t held_out_tokens = 8192;  // others, that the outcome is measured on
  int episodes = 200;
  int tasks = 24;  // held out: batch, length and budget
  uint64_t seed = 1;
  std::string out;
  std::string figures;
};

absl::Status TrainBlocks(const TrainBlocksOptions& options);

}  // namespace espalier
