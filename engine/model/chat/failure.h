// How this folder gives up: an exception that never leaves it (Compile and Render turn it into a
// Status), and the budget that ends hostile templates.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace espalier::jinja {

struct Failure {
  absl::Status status;
};

// The template, or the values it was given, are wrong.
[[noreturn]] inline void Fail(const std::string& message) {
  throw Failure{absl::InvalidArgumentError(message)};
}

[[noreturn]] inline void FailBound(const std::string& message) {
  throw Failure{absl::ResourceExhaustedError(message)};
}

inline constexpr size_t kMaxSource = 1 << 20;    // bytes of a template; real ones have some 10,000
inline constexpr size_t kMaxText = 16 << 20;     // bytes of any one string, output included
inline constexpr size_t kMaxSteps = 10'000'000;  // of one rendering; about a second
inline constexpr int kMaxSyntaxDepth = 200;      // nesting of a template
inline constexpr int kMaxValueDepth = 100;       // nesting of lists and dicts
inline constexpr int kMaxEvaluationDepth = 400;  // calls of macros times their nesting

// Steps of one rendering. A step stands for one evaluated node or for 32 bytes made, so that the
// same number bounds the time and, at 320 MB, the memory.
class Budget {
 public:
  void Charge(size_t steps) {
    if (steps > left_) FailBound("the template takes more than 10,000,000 steps");
    left_ -= steps;
  }
  void ChargeBytes(size_t bytes) { Charge(bytes / 32); }
  void ChargeItems(size_t items) { Charge(items * 4); }  // 128 bytes: a value and its short string

 private:
  size_t left_ = kMaxSteps;
};

}  // namespace espalier::jinja
