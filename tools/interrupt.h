// Ctrl-C, SIGTERM or SIGHUP as a cancellation: the call in flight is cancelled and ends in order.
#pragma once

#include <csignal>
#include <functional>
#include <thread>

namespace espalier {

// While it lives, the first SIGINT, SIGTERM or SIGHUP, if that is not ignored, calls `cancel`
// (once, on a thread of its own) and a second one ends the process as it does by default. One at a
// time.
class Interrupt {
 public:
  explicit Interrupt(std::function<void()> cancel);
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  // The signal that was caught since the process began; 0: none.
  static int raised();

 private:
  struct sigaction previous_[3]{};  // of SIGINT, SIGTERM, SIGHUP
  std::thread waiter_;
};

}  // namespace espalier
