// SIGTERM and SIGINT as something to wait for; a second one ends the process at once.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace espalier {

class StopSignal {
 public:
  // To be made, once, before any other thread: it blocks the signals for all of them. It lives as
  // long as the process.
  static StopSignal& Install();

  // While set, the first signal ends the process with status 0: there is nothing to finish yet.
  void set_nothing_to_finish(bool nothing) { nothing_to_finish_ = nothing; }

  // True once a signal came; waits for it at most so long.
  bool WaitFor(std::chrono::milliseconds time);

 private:
  StopSignal() = default;
  void Watch();

  std::atomic<bool> nothing_to_finish_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool raised_ = false;
};

}  // namespace espalier
