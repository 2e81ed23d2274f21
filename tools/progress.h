// A one-line progress bar on a terminal's stderr; silent anywhere else.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace espalier {

bool StderrIsTerminal();

// "label [#####.....]  50 % 16/32, 3 s left", at most `width` columns (80 if that is too few to
// say anything). `elapsed` seconds; the time left is told once it can be guessed.
std::string RenderProgress(std::string_view label, int64_t done, int64_t total, double elapsed,
                           int width);

class Progress {
 public:
  explicit Progress(std::string label, bool visible = StderrIsTerminal());
  ~Progress();  // wipes the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Draws at most 20 times a second.
  void Update(int64_t done, int64_t total);

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  bool visible_;
  bool drawn_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_;
};

}  // namespace espalier
