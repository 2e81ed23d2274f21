// Crashes with a message when something is false that only a fault of ours can make false.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace espalier {

template <typename... Args>
void Invariant(bool holds, fmt::format_string<Args...> message, Args&&... args) {
  if (holds) [[likely]]
    return;
  fmt::print(stderr, "broken invariant: {}\n", fmt::format(message, std::forward<Args>(args)...));
  std::abort();
}

}  // namespace espalier
