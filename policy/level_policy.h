// A policy that decides on a level for all, a rung of the ladder, a few times a second, from a
// handful of numbers: what learned policies have in common.
#pragma once

#include <array>
#include <span>
#include <string_view>

#include "policy/policy.h"
#include "policy/training/q_network.h"

namespace espalier {

// What is decided by, each about 0 to 1 in calm and at most 4:
//   KV used and promised, as shares of what there may be; the queue, as a share of its bound; the
//   oldest wait and a step, over their targets; log2(1 + running) / 8 and log2(1 + waiting) / 8;
//   by how much the last grew since the last decision; a first token's time, over its target;
//   log2(1 + arrivals a second) / 8; the level, as a share of the ladder; 1 in the first decision.
inline constexpr int kLevelInputs = 12;
using LevelState = std::array<float, kLevelInputs>;

struct LevelPolicyOptions {
  double ttft_target_s = 1;
  double tpot_target_s = 0.1;
  double every_s = 0.5;  // between decisions
  // As LadderPolicyOptions: beyond it only while running sequences hold more KV than there may be.
  double load_loss = 0.2;
};

// To be served by in a Shield, which knows who is an exception to the level.
class LevelPolicy : public Policy {
 public:
  explicit LevelPolicy(const LevelPolicyOptions& options) : options_(options) {}

  void Observe(const PressureReport& report, const Ladder& ladder) override;
  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, level_);
  }
  std::string_view reason() const override { return level_ == 0 ? "none" : "learned"; }

 protected:
  // The level until the next decision, in [0, rungs): of a ladder's first `rungs` rungs, which are
  // those that load, or memory, may raise it to now.
  virtual int Decide(const LevelState& state, int rungs) = 0;

 private:
  LevelPolicyOptions options_;
  int level_ = 0;
  double decided_s_ = 0;
  bool first_ = true;
  float waiting_ = 0;  // the input, as of the last decision
};

// The level of the highest value by a Q-network with an action for each rung.
class DqnPolicy final : public LevelPolicy {
 public:
  // `network` must outlive the policy and have kLevelInputs inputs, at most kMostHidden units and
  // as many actions as the ladder has rungs, which whoever loads it checks by Fits.
  DqnPolicy(const LevelPolicyOptions& options, const QNetwork* network)
      : LevelPolicy(options), network_(network) {}

  static constexpr int kMostHidden = 128;
  static bool Fits(const QShape& shape, int rungs) {
    return shape.inputs == kLevelInputs && shape.hidden <= kMostHidden && shape.actions == rungs;
  }

  std::string_view name() const override { return "dqn"; }
  std::span<const float> scores() const override { return std::span(values_).first(open_); }

 protected:
  int Decide(const LevelState& state, int rungs) override;

 private:
  const QNetwork* const network_;
  std::array<float, kMostRungs> values_ = {};
  int open_ = 0;  // rungs, in the last decision
};

}  // namespace espalier
