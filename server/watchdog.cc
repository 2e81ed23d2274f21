#include "server/watchdog.h"

#include <algorithm>

namespace espalier {

using std::chrono::milliseconds;

milliseconds Watchdog::interval() const {
  constexpr milliseconds kShortest{1}, kLongest{1000};
  return bound_.count() == 0 ? kLongest : std::clamp(bound_ / 4, kShortest, kLongest);
}

bool Watchdog::Look(double seconds_without_progress) {
  const bool before = stuck_;
  stuck_ = bound_.count() > 0 &&
           seconds_without_progress > std::chrono::duration<double>(bound_).count();
  return stuck_ != before;
}

}  // namespace espalier
