#include "engine/model_config.h"

#include <cmath>
#include <numbers>

namespace espalier {

std::vector<float> InverseFrequencies(const ModelConfig& config) {
  const int half = config.head_dim / 2;
  std::vector<float> frequencies(half);
  for (int i = 0; i < half; ++i) {
    const double exponent = 2.0 * i / config.head_dim;
    double frequency = 1.0 / std::pow(static_cast<double>(config.rope_theta), exponent);
    if (const RopeScaling& scaling = config.rope_scaling; scaling.llama3) {
      const double wavelength = 2.0 * std::numbers::pi / frequency;
      const double turns = scaling.original_context / wavelength;
      const double smooth =
          (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
      if (turns < scaling.low_freq_factor) {
        frequency /= scaling.factor;
      } else if (turns <= scaling.high_freq_factor) {
        frequency = (1.0 - smooth) * frequency / scaling.factor + smooth * frequency;
      }
    }
    frequencies[i] = static_cast<float>(frequency);
  }
  return frequencies;
}

}  // namespace espalier
