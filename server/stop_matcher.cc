#include "server/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace espalier {
namespace {

// Length of the longest end of `text` that is a beginning, but not all, of `stop`.
size_t PartialMatch(std::string_view text, std::string_view stop) {
  for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length) {
    if (text.ends_with(stop.substr(0, length))) return length;
  }
  return 0;
}

}  // namespace

std::string StopMatcher::Push(std::string_view piece, bool may_stop) {
  if (!matched_.empty()) return {};
  if (stops_.empty()) return std::string(piece);
  std::string text = std::exchange(held_, {});
  text += piece;

  if (may_stop) {
    size_t first_end = std::string::npos;
    for (const std::string& stop : stops_) {
      const size_t start = text.find(stop);
      if (start == std::string::npos) continue;
      const size_t end = start + stop.size();
      if (end < first_end || (end == first_end && stop.size() > matched_.size())) {
        first_end = end;
        matched_ = stop;
      }
    }
    if (!matched_.empty()) {
      text.resize(first_end - matched_.size());
      return text;
    }
  }

  size_t held = 0;
  for (const std::string& stop : stops_) held = std::max(held, PartialMatch(text, stop));
  held_ = text.substr(text.size() - held);
  text.resize(text.size() - held);
  return text;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace espalier
