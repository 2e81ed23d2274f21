#include "tools/interrupt.h"

#include <unistd.h>

#include <atomic>
#include <utility>

namespace espalier {
namespace {

// What a signal handler may touch: a lock-free flag and a pipe. The pipe outlives every guard, so
// that a late handler never writes to a descriptor that means something else.
std::atomic<int> caught = 0;  // the signal
int wake[2] = {-1, -1};

void OnSignal(int signal) {
  if (caught.exchange(signal) != 0) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  const char byte = 'c';
  [[maybe_unused]] const ssize_t written = write(wake[1], &byte, 1);
}

}  // namespace

Interrupt::Interrupt(std::function<void()> cancel) {
  if (wake[0] < 0 && pipe(wake) != 0) return;  // out of descriptors: Ctrl-C ends the process
  waiter_ = std::thread([cancel = std::move(cancel)] {
    char byte = 0;
    while (read(wake[0], &byte, 1) == 1) {
      if (byte != 'c') return;
      cancel();
    }
  });
  struct sigaction action{};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, &previous_[0]);
  sigaction(SIGTERM, &action, &previous_[1]);
  sigaction(SIGHUP, nullptr, &previous_[2]);
  if (previous_[2].sa_handler != SIG_IGN) sigaction(SIGHUP, &action, nullptr);  // nohup
}

Interrupt::~Interrupt() {
  if (!waiter_.joinable()) return;
  sigaction(SIGINT, &previous_[0], nullptr);
  sigaction(SIGTERM, &previous_[1], nullptr);
  sigaction(SIGHUP, &previous_[2], nullptr);
  const char byte = 'q';
  [[maybe_unused]] const ssize_t written = write(wake[1], &byte, 1);
  waiter_.join();
}

int Interrupt::raised() { return caught.load(); }

}  // namespace espalier
