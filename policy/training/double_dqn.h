// Double DQN (van Hasselt et al., arXiv 1509.06461): learns a Q-network from remembered steps.
//
// Nothing here knows what states and actions mean, and all randomness comes from the seed.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "policy/training/q_network.h"

namespace espalier {

struct DqnOptions {
  float gamma = 1;              // of what comes a step later
  float learning_rate = 1e-3F;  // Adam's, betas 0.9 and 0.999
  int batch = 64;               // remembered steps a Learn
  int replay = 20'000;          // steps remembered; the oldest are forgotten first
  int target_every = 200;       // Learns between copies into the target network
  float gradient_clip = 1;      // on the norm over all parameters
  uint64_t seed = 1;
};

struct Transition {
  std::vector<float> state;
  int action = 0;
  float reward = 0;
  // Of the state it led to; empty: it was the last.
  std::vector<float> next_state;
  std::vector<uint8_t> next_allowed;  // [actions]: 0 is never taken
};

class DoubleDqn {
 public:
  DoubleDqn(const QShape& shape, const DqnOptions& options);

  const QNetwork& network() const { return network_; }

  void Remember(Transition transition);

  // One step of Adam on the Huber loss of a batch drawn from what is remembered, towards
  //   reward + gamma Q_target(next, argmax over what is allowed of Q(next, .)).
  // Returns the loss; 0, and nothing is done, before a batch is remembered.
  float Learn();

  // The allowed action of the highest value, the first of equal ones. At least one must be allowed.
  int Choose(std::span<const float> state, std::span<const uint8_t> allowed);
  // True with that chance: the caller then tries something else.
  bool Explores(double epsilon);
  std::mt19937_64& random() { return random_; }

 private:
  int Best(const QNetwork& network, std::span<const float> state, std::span<const uint8_t> allowed);

  DqnOptions options_;
  std::mt19937_64 random_;
  QNetwork network_, target_;
  std::vector<Transition> replay_;
  size_t oldest_ = 0;
  std::vector<float> gradient_, first_, second_;  // [parameters]; Adam's moments
  std::vector<float> hidden_, values_;            // scratch
  int64_t learned_ = 0;
};

}  // namespace espalier
