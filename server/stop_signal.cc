#include "server/stop_signal.h"

#include <pthread.h>
#include <signal.h>

#include <cstdlib>
#include <thread>

namespace espalier {
namespace {

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

}  // namespace

StopSignal& StopSignal::Install() {
  static StopSignal* const installed = [] {
    const sigset_t signals = StopSignals();
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    auto* stop = new StopSignal;  // its thread never ends
    std::thread([stop] { stop->Watch(); }).detach();
    return stop;
  }();
  return *installed;
}

void StopSignal::Watch() {
  const sigset_t signals = StopSignals();
  for (;;) {
    int signal = 0;
    sigwait(&signals, &signal);
    if (nothing_to_finish_) std::_Exit(0);
    std::lock_guard lock(mutex_);
    if (raised_) std::_Exit(128 + signal);
    raised_ = true;
    changed_.notify_all();
  }
}

bool StopSignal::WaitFor(std::chrono::milliseconds time) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, time, [this] { return raised_; });
}

}  // namespace espalier
