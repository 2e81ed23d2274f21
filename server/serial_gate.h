// Lets one thread at a time into a call's write loop and makes nobody wait or get lost.
//
// A stream's tokens, the end of a write and a cancellation reach a call on different threads, in
// any order. Whoever finds the gate open goes in; whoever finds it taken has knocked, and the one
// inside goes round once more before leaving.
#pragma once

#include <atomic>

namespace espalier {

class SerialGate {
 public:
  // True: the caller is inside. False: someone else is, and will see what the caller brought.
  bool Enter() { return knocks_.fetch_add(1, std::memory_order_acq_rel) == 0; }

  // True: the caller has left. False: someone knocked; look again, then leave again. Never called
  // by who stays inside for good, as a finished call does.
  bool Leave() {
    int only_me = 1;
    if (knocks_.compare_exchange_strong(only_me, 0, std::memory_order_acq_rel)) return true;
    knocks_.exchange(1, std::memory_order_acq_rel);  // one more round answers every knock so far
    return false;
  }

 private:
  std::atomic<int> knocks_{0};
};

}  // namespace espalier
