// Ctrl-C as a cancellation: the call in flight is cancelled and ends in order.
#pragma once

#include <csignal>
#include <functional>
#include <thread>

namespace espalier {

// While it lives, the first SIGINT calls `cancel` (once, on a thread of its own) and a second one
// ends the process as SIGINT does by default. One at a time.
class Interrupt {
 public:
  explicit Interrupt(std::function<void()> cancel);
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  // Whether a SIGINT was caught since the process began.
  static bool raised();

 private:
  struct sigaction previous_{};
  std::thread waiter_;
};

}  // namespace espalier
