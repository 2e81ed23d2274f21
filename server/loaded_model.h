// One generation of the model that is served: its weights, and all that is made for them, from the
// ladder to the engine. Made before the server opens, and again for each reload.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/model/files/model_file.h"
#include "engine/model/model_executor.h"
#include "engine/model/pruning_file.h"
#include "engine/pruning/probe.h"
#include "policy/capped_policy.h"
#include "policy/policy.h"
#include "policy/training/q_network.h"
#include "server/decision_log.h"
#include "server/moments_keeper.h"
#include "server/options.h"
#include "server/quality_check.h"
#include "server/served_model.h"

namespace espalier {

class LoadedModel {
 public:
  struct Order {
    std::string ladder;        // empty: the full model alone
    std::string name;          // that calls know it by; empty: the option's, or the file's own
    uint64_t kv_bytes = 0;     // as ModelOptions
    std::string decision_log;  // empty: none
    MomentsKeeper* moments = nullptr;  // which it adds to where they are of it; null: none
    ModelExecutor::Progress progress;
  };

  // Weights that rungs do not need may leave memory, and are read again from `file`, which stays
  // mapped for that. Errors name file and tensor, the option that does not fit, or the bytes that
  // are not there; Cancelled if progress says false.
  static absl::StatusOr<std::unique_ptr<LoadedModel>> Load(const ServerOptions& options,
                                                           std::shared_ptr<const ModelFile> file,
                                                           const Order& order);

  // Runs one request through the engine, before anyone else may.
  absl::Status WarmUp();

  // What calls see of it, but for its words.
  ServedModel Describe() const;

  Engine* engine() { return engine_.get(); }
  const ModelExecutor& executor() const { return *executor_; }
  QualityCheck* quality() { return quality_.get(); }  // null: none
  // That the policy serves no harder than this. Engine thread.
  void set_hardest(int hardest) {
    capped_->set_hardest(hardest);
    if (decisions_ != nullptr) decisions_->AddCap(hardest);
  }
  // Callers may still ask for its last decisions; their file ends with it.
  ~LoadedModel() {
    if (decisions_ != nullptr) decisions_->Close();
  }

  // What --probe has learned to --history-file, if there are such. After the engine's last step.
  void KeepHistory() const;

 private:
  explicit LoadedModel(const ServerOptions& options);
  absl::Status LoadWeights(const std::shared_ptr<const ModelFile>& opened, const Order& order);
  absl::Status MakePolicy(const Order& order);
  absl::Status SetProbe(const ModelFile& file);

  const ServerOptions& options_;
  // In the order in which they are made; whoever uses another comes after it.
  const LadderPolicyOptions rule_;
  std::shared_ptr<DecisionLog> decisions_;  // null: a fixed policy decides nothing
  std::unique_ptr<QNetwork> network_;
  std::unique_ptr<Policy> learned_, chosen_, logged_;
  std::unique_ptr<CappedPolicy> capped_;
  std::unique_ptr<QualityCheck> quality_;
  std::unique_ptr<Policy> shadow_;
  Policy* policy_ = nullptr;  // the outermost of these
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Probe> probe_;
  std::string fingerprint_, name_;  // of the model
  std::unique_ptr<ModelExecutor> executor_;
  std::unique_ptr<Engine> engine_;
};

// That a file can take the place of what is served: FailedPrecondition, with the first of its
// dimensions, or of its words, that differs, and both values. How a file lays its rows out, and
// whether it has an LM head of its own, are its own business.
absl::Status CheckReplaces(const ServedModel& served, const ModelFile& file);

// That the policy which the options ask for can serve a ladder of `rungs` rungs that lies at
// `ladder` (empty: the full model alone): FailedPrecondition, naming the option or the network's
// file.
absl::Status CheckPolicy(const ServerOptions& options, const std::string& ladder, int rungs);

// What the weights of a file take in memory, within some percent, with the panels and refitted
// weights of its ladder, if that is not null.
uint64_t EstimateWeightBytes(const ModelFile& file, WeightPlan plan,
                             const CalibratedLadder* ladder);

}  // namespace espalier
