// What a policy saw and chose, as lines of JSON in a file: `espalier replay` gives the same
// choices.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "policy/ladder_policy.h"

namespace espalier {

// A step's pressure, and what came of it.
struct Decision {
  PressureReport report;
  int rung = 0;  // Policy::wanted
  std::string_view reason;
};

// Adds are bounded and never wait for the disk: what does not fit is left out, and the gap is told
// by a line of its own.
class DecisionLog {
 public:
  // Begins the file anew, with a line for the policy: the rule's options and, of a learned policy
  // that it shields, PolicyFile::version. Unavailable if it cannot be written.
  static absl::StatusOr<std::unique_ptr<DecisionLog>> Create(const std::string& path,
                                                             const LadderPolicyOptions& options,
                                                             std::string_view learned = "");
  // Writes what is left.
  ~DecisionLog();

  // Engine thread.
  void Add(const Decision& decision);

 private:
  explicit DecisionLog(std::ofstream file);
  void Run();

  std::ofstream file_;
  std::mutex mutex_;
  std::condition_variable ending_;
  std::vector<Decision> waiting_;
  int64_t dropped_ = 0;
  bool ended_ = false;
  std::thread thread_;
};

// Another policy's choices, told to a log.
class LoggedPolicy final : public Policy {
 public:
  LoggedPolicy(Policy* policy, DecisionLog* log) : policy_(policy), log_(log) {}
  void Observe(const PressureReport& report, const Ladder& ladder) override {
    policy_->Observe(report, ladder);
    log_->Add({report, policy_->wanted(), policy_->reason()});
  }
  int ChooseRung(const RequestTraits& traits) const override { return policy_->ChooseRung(traits); }
  std::string_view name() const override { return policy_->name(); }
  std::string_view reason() const override { return policy_->reason(); }
  bool refuses() const override { return policy_->refuses(); }
  int wanted() const override { return policy_->wanted(); }

 private:
  Policy* const policy_;
  DecisionLog* const log_;
};

}  // namespace espalier
