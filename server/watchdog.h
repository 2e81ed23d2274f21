// Notices that the engine makes no progress while work waits, and that it does again.
#pragma once

#include <chrono>

namespace espalier {

class Watchdog {
 public:
  // An engine that gets nowhere for longer than `bound` is stuck; 0: none ever is.
  explicit Watchdog(std::chrono::milliseconds bound) : bound_(bound) {}

  // How often to look, so that a stall is told no later than a quarter of the bound after it, or a
  // millisecond if that is longer.
  std::chrono::milliseconds interval() const;

  // Told EngineThread::seconds_without_progress(). True if `stuck` has changed.
  bool Look(double seconds_without_progress);

  bool stuck() const { return stuck_; }

 private:
  const std::chrono::milliseconds bound_;
  bool stuck_ = false;
};

}  // namespace espalier
