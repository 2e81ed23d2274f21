// Finds stop strings in streamed text, also across the borders of its pieces.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace espalier {

class StopMatcher {
 public:
  // No string may be empty. None at all: text passes straight through.
  explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // Takes the next piece and returns the text that no stop string can claim any more. What could
  // still become one is held back, which is always whole characters if pieces and stops are.
  // With `may_stop`, the stop string that is complete first (the longest, if several are) ends the
  // text: it and all behind it is dropped. Otherwise it is text like any other.
  std::string Push(std::string_view piece, bool may_stop);

  // What was held back: no more text comes.
  std::string Flush();

  // The stop string that matched; empty: none yet. After a match Push returns nothing.
  std::string_view matched() const { return matched_; }

 private:
  const std::vector<std::string> stops_;
  std::string held_;
  std::string_view matched_;
};

}  // namespace espalier
