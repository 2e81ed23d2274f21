#include "policy/training/double_dqn.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace espalier {

DoubleDqn::DoubleDqn(const QShape& shape, const DqnOptions& options)
    : options_(options),
      random_(options.seed),
      network_(shape, &random_),
      target_(network_),
      gradient_(network_.parameters().size()),
      first_(gradient_.size()),
      second_(gradient_.size()),
      hidden_(shape.hidden),
      values_(shape.actions) {}

void DoubleDqn::Remember(Transition transition) {
  if (replay_.size() < static_cast<size_t>(options_.replay)) {
    replay_.push_back(std::move(transition));
    return;
  }
  replay_[oldest_] = std::move(transition);
  oldest_ = (oldest_ + 1) % replay_.size();
}

int DoubleDqn::Best(const QNetwork& network, std::span<const float> state,
                    std::span<const uint8_t> allowed) {
  network.Values(state, hidden_, values_);
  int best = -1;
  for (int action = 0; action < network.shape().actions; ++action) {
    if (allowed[action] && (best < 0 || values_[action] > values_[best])) best = action;
  }
  return best;
}

bool DoubleDqn::Explores(double epsilon) {
  return static_cast<double>(random_() >> 11) * 0x1p-53 < epsilon;
}

int DoubleDqn::Choose(std::span<const float> state, std::span<const uint8_t> allowed) {
  return Best(network_, state, allowed);
}

float DoubleDqn::Learn() {
  if (replay_.size() < static_cast<size_t>(options_.batch)) return 0;
  const QShape& shape = network_.shape();
  std::ranges::fill(gradient_, 0.0F);
  float total = 0;
  for (int i = 0; i < options_.batch; ++i) {
    const Transition& step = replay_[random_() % replay_.size()];
    float goal = step.reward;
    if (!step.next_state.empty()) {
      const int next = Best(network_, step.next_state, step.next_allowed);
      target_.Values(step.next_state, hidden_, values_);
      goal += options_.gamma * values_[next];
    }
    network_.Values(step.state, hidden_, values_);
    const float error = values_[step.action] - goal;
    total += std::abs(error) <= 1 ? 0.5F * error * error : std::abs(error) - 0.5F;
    const float slope = std::clamp(error, -1.0F, 1.0F) / static_cast<float>(options_.batch);
    const float* const weights = network_.parameters().data() + network_.output();
    gradient_[network_.output_bias() + step.action] += slope;
    for (int h = 0; h < shape.hidden; ++h) {
      const int weight = h * shape.actions + step.action;
      gradient_[network_.output() + weight] += slope * hidden_[h];
      hidden_[h] = hidden_[h] > 0 ? slope * weights[weight] : 0;  // from here on, its slope
      gradient_[network_.hidden_bias() + h] += hidden_[h];
    }
    float* of_input = gradient_.data();
    for (const float input : step.state) {
      for (int h = 0; h < shape.hidden; ++h) of_input[h] += hidden_[h] * input;
      of_input += shape.hidden;
    }
  }
  double norm = 0;
  for (const float value : gradient_) norm += static_cast<double>(value) * value;
  norm = std::sqrt(norm);
  const auto scale =
      static_cast<float>(norm > options_.gradient_clip ? options_.gradient_clip / norm : 1);
  ++learned_;
  constexpr float kBeta1 = 0.9F, kBeta2 = 0.999F;
  const auto steps = static_cast<float>(learned_);
  const float correct1 = 1 - std::pow(kBeta1, steps), correct2 = 1 - std::pow(kBeta2, steps);
  const std::span<float> parameters = network_.parameters();
  for (size_t i = 0; i < gradient_.size(); ++i) {
    const float slope = gradient_[i] * scale;
    first_[i] = kBeta1 * first_[i] + (1 - kBeta1) * slope;
    second_[i] = kBeta2 * second_[i] + (1 - kBeta2) * slope * slope;
    parameters[i] -= options_.learning_rate * (first_[i] / correct1) /
                     (std::sqrt(second_[i] / correct2) + 1e-8F);
  }
  if (learned_ % options_.target_every == 0) target_ = network_;
  return total / static_cast<float>(options_.batch);
}

}  // namespace espalier
