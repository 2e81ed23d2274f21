// The model that is served, as the calls see it: its words and its limits, never its weights.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "engine/model/chat/chat_template.h"
#include "engine/model/text/tokenizer.h"
#include "engine/model_config.h"
#include "policy/ladder.h"
#include "server/decision_log.h"

namespace espalier {

struct ServedModel {
  std::string name;
  ModelConfig config;
  // Of all generations of a model.
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  // null: the model has none
  int max_sequence_tokens = 0;                        // longest prompt + output
  std::string weight_type;
  std::string kv_type;
  std::string device;
  Ladder ladder = Ladder::DenseOnly({});
  std::string policy = "fixed";                  // who chooses rungs
  std::shared_ptr<const DecisionLog> decisions;  // null: they are always the same
};

// The generations of it that calls may be of: the one that is served, and the one before while
// somebody is left there. Thread-safe.
class ServedModels {
 public:
  explicit ServedModels(std::shared_ptr<const ServedModel> first) : models_{std::move(first)} {}

  // Of this generation, as the inbox counts them.
  std::shared_ptr<const ServedModel> of(int generation) const {
    std::lock_guard lock(mutex_);
    return models_[generation & 1];
  }
  // In place of the one two before, of which nobody is left.
  void Set(int generation, std::shared_ptr<const ServedModel> model) {
    std::lock_guard lock(mutex_);
    models_[generation & 1] = std::move(model);
  }

 private:
  mutable std::mutex mutex_;
  std::array<std::shared_ptr<const ServedModel>, 2> models_;
};

}  // namespace espalier
