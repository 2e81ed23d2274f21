// The server's one clock: monotonic nanoseconds, as the engine counts time.
#pragma once

#include <chrono>

#include "engine/scheduling/request.h"

namespace espalier {

inline Instant SteadyNow() { return std::chrono::steady_clock::now().time_since_epoch(); }

inline double Seconds(Instant span) { return std::chrono::duration<double>(span).count(); }

}  // namespace espalier
