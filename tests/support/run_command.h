// Runs the `espalier` command within a test, and keeps what it says.
#pragma once

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tools/command.h"

namespace espalier {

struct Outcome {
  int code = 0;
  std::string out;
  std::string err;
};

inline Outcome RunWith(const std::vector<std::string>& arguments) {
  std::vector<const char*> argv = {"espalier"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  Outcome outcome;
  outcome.code = RunCommand(static_cast<int>(argv.size()), argv.data());
  outcome.out = testing::internal::GetCapturedStdout();
  outcome.err = testing::internal::GetCapturedStderr();
  return outcome;
}

}  // namespace espalier
