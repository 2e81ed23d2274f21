// Where this machine keeps the data that a clone has not: golden figures, a real model, a text.
#pragma once

#include <cstdlib>
#include <string>

#include "gtest/gtest.h"

namespace espalier {

// Value of an environment variable that names a file or folder; empty if unset.
inline std::string PathFromEnvironment(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

}  // namespace espalier

// In a test or SetUp: `const std::string name` is the variable's path, or the test is skipped and
// the message names the variable.
#define ESPALIER_PATH_OR_SKIP(name, variable)                         \
  const std::string name = ::espalier::PathFromEnvironment(variable); \
  if (name.empty()) GTEST_SKIP() << variable " is not set"
