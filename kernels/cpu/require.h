// Crashes with a message when a caller inside the process broke an op's contract.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "fmt/format.h"

namespace espalier {

template <typename... Args>
void Require(bool holds, fmt::format_string<Args...> message, Args&&... args) {
  if (holds) [[likely]]
    return;
  fmt::print(stderr, "kernels: {}\n", fmt::format(message, std::forward<Args>(args)...));
  std::abort();
}

}  // namespace espalier
