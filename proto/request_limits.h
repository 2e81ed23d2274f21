// The ranges that espalier.proto states for a request's fields: the server enforces them, and the
// command refuses early what is outside.
#pragma once

#include <cstddef>

namespace espalier {

inline constexpr float kMaxTemperature = 100;        // from 0
inline constexpr float kMaxRepetitionPenalty = 100;  // from above 0
inline constexpr float kMaxPenalty = 2;              // presence and frequency; from -2
inline constexpr float kMaxLogitBias = 100;          // from -100
inline constexpr int kMaxLogitBiases = 1024;
inline constexpr int kMaxTopLogprobs = 20;
inline constexpr int kMaxStopStrings = 16;
inline constexpr size_t kMaxStopBytes = 256;  // from 1
inline constexpr int kMaxStopTokens = 64;

}  // namespace espalier
