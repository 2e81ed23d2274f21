#include "tools/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

namespace espalier {
namespace {

constexpr int kLeastWidth = 40;

int TerminalWidth() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string TimeLeft(double seconds) {
  if (seconds < 90) return fmt::format("{:.0f} s left", std::ceil(seconds));
  return fmt::format("{:.0f} min left", std::ceil(seconds / 60));
}

}  // namespace

bool StderrIsTerminal() { return isatty(STDERR_FILENO) == 1; }

std::string RenderProgress(std::string_view label, int64_t done, int64_t total, double elapsed,
                           int width) {
  if (width < kLeastWidth) width = 80;
  const double share =
      total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0;
  std::string tail = fmt::format("] {:3.0f} % {}/{}", std::floor(share * 100), done, total);
  // A guess from less than half a second or 2 % of the work would jump about.
  if (share > 0.02 && share < 1 && elapsed > 0.5) {
    tail += ", " + TimeLeft(elapsed * (1 - share) / share);
  }
  const int room = width - 1 - static_cast<int>(label.size() + 2 + tail.size());
  if (room < 5) return fmt::format("{} {}", label, tail.substr(2)).substr(0, width - 1);
  const int bar = std::min(room, 40);
  const int full = static_cast<int>(share * bar);
  return fmt::format("{} [{}{}{}", label, std::string(full, '#'), std::string(bar - full, '.'),
                     tail);
}

Progress::Progress(std::string label, bool visible)
    : label_(std::move(label)), visible_(visible), last_(start_ - std::chrono::seconds(1)) {}

Progress::~Progress() {
  if (drawn_) fmt::print(stderr, "\r\x1b[K");
}

void Progress::Update(int64_t done, int64_t total) {
  const Clock::time_point now = Clock::now();
  if (!visible_ || (now - last_ < std::chrono::milliseconds(50) && done < total)) return;
  last_ = now;
  drawn_ = true;
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  fmt::print(stderr, "\r\x1b[K{}", RenderProgress(label_, done, total, elapsed, TerminalWidth()));
  std::fflush(stderr);
}

}  // namespace espalier
