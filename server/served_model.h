// The model that is served, as the calls see it: its words and its limits, never its weights.
#pragma once

#include <memory>
#include <string>

#include "engine/model/chat/chat_template.h"
#include "engine/model/text/tokenizer.h"
#include "engine/model_config.h"
#include "policy/ladder.h"

namespace espalier {

struct ServedModel {
  std::string name;
  ModelConfig config;
  std::unique_ptr<const Tokenizer> tokenizer;
  std::unique_ptr<const ChatTemplate> chat_template;  // null: the model has none
  int max_sequence_tokens = 0;                        // longest prompt + output
  std::string weight_type;
  std::string kv_type;
  std::string device;
  Ladder ladder = Ladder::DenseOnly({});
  std::string policy = "fixed";  // who chooses rungs
};

}  // namespace espalier
