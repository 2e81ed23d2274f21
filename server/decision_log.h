// What a policy saw and chose, as lines of JSON: the last of them for who asks, and all in a file,
// of which `espalier replay` gives the same choices.
//
// The first line names the policy and tells its options. Of those after it
//   {"time_s":...}   is a report, the level that it made, behind what waits newcomers are refused,
//                    and what a learned policy thinks rungs are worth, where that is news;
//   {"request":...}  is the rung of a request that named none, at its admission or as it moves, by
//                    its traits: the one that is wanted, and the one that it is;
//   {"losses":[...]} and {"cap":...} are what rungs are taken to lose and the hardest that may be
//                    served, from now on;
//   {"dropped":...}  is how many lines are missing here.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include "absl/status/statusor.h"
#include "policy/ladder_policy.h"

namespace espalier {

// Adds are bounded, allocate nothing and never wait for the disk: what does not fit is left out of
// the file, and the gap is told by a line of its own. From one thread at a time: the engine's.
class DecisionLog {
 public:
  // With a line for the policy first: the rule's options and, of a learned policy that it shields,
  // PolicyFile::version. `path`: the file, which is begun anew, and what was there is PATH.old from
  // then on; empty: none. Unavailable if it cannot be written.
  static absl::StatusOr<std::unique_ptr<DecisionLog>> Create(const std::string& path,
                                                             const LadderPolicyOptions& options,
                                                             std::string_view learned = "");
  ~DecisionLog() { Close(); }

  // Writes what is left to the file, and no more from now on.
  void Close();

  // What `policy` made of a report; before it, what rungs lose if that is news.
  void AddReport(const PressureReport& report, const Ladder& ladder, const Policy& policy);
  // A request's rung, and the one that the policy would have it at.
  void AddChoice(uint64_t request, const RequestTraits& traits, int wanted, int rung);
  void AddCap(int hardest);

  // The policy's line, and the last ones: `most` of them, or as many as are kept, a thousand or
  // more. Before them what holds still of losses and caps, and how many are missing. Any thread.
  std::string Recent(size_t most) const;

 private:
  explicit DecisionLog(std::string first_line);
  template <typename Write>
  void Add(const Write& write);
  void AddLosses(const Ladder& ladder);
  void Run();

  const std::string first_line_;
  std::array<double, kMostRungs> losses_ = {};  // as last told
  int losses_told_ = 0;
  std::array<float, kMostRungs> scores_ = {};  // as last told
  mutable std::mutex mutex_;
  // The last lines, those in `older_` first, which are forgotten once `newer_` is full.
  std::string older_, newer_;
  std::string losses_line_, cap_line_;  // the last of them
  int64_t lines_ = 0;                   // since the first

  // Of the file, if there is one.
  std::ofstream file_;
  std::condition_variable ending_;
  std::string waiting_, writing_;
  int64_t dropped_ = 0;
  bool ended_ = false;
  std::thread thread_;
};

// Another policy's choices, told to a log.
class LoggedPolicy final : public ForwardingPolicy {
 public:
  LoggedPolicy(Policy* policy, DecisionLog* log) : ForwardingPolicy(policy), log_(log) {}
  void Observe(const PressureReport& report, const Ladder& ladder) override {
    ForwardingPolicy::Observe(report, ladder);
    log_->AddReport(report, ladder, policy());
  }
  void Chose(uint64_t request, const RequestTraits& traits, int rung) override {
    log_->AddChoice(request, traits, ChooseRung(traits), rung);
    ForwardingPolicy::Chose(request, traits, rung);
  }

 private:
  DecisionLog* const log_;
};

}  // namespace espalier
