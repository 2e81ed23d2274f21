#include "engine/sim/traffic.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <numbers>
#include <random>
#include <span>
#include <utility>

namespace espalier {
namespace {

constexpr double kMostSeconds = 1e8;
constexpr int kMostTokens = 1 << 20;

Instant At(double seconds) {
  return std::chrono::duration_cast<Instant>(std::chrono::duration<double>(seconds));
}

// The standard library's distributions differ between libraries; these do not.
class Draws {
 public:
  explicit Draws(uint64_t seed) : random_(seed) {}
  double Uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }
  double Exponential(double mean) { return -mean * std::log1p(-Uniform()); }
  double Normal() {
    const double radius = std::sqrt(-2 * std::log1p(-Uniform()));
    return radius * std::cos(2 * std::numbers::pi * Uniform());
  }
  int Length(const Lengths& lengths) {
    const double tokens = lengths.median * std::exp(lengths.spread * Normal());
    return static_cast<int>(std::clamp(std::round(tokens), 1.0, double(lengths.most)));
  }

 private:
  std::mt19937_64 random_;
};

// As a multiple of the mean rate; at most kHighest.
constexpr double kHighest = 3;
double RateAt(const TrafficOptions& options, double seconds) {
  const double phase = seconds / options.period_s - std::floor(seconds / options.period_s);
  switch (options.arrivals) {
    case Arrivals::kPoisson:
      return 1;
    case Arrivals::kBursts:
      return phase < 0.25 ? 3 : 1.0 / 3;
    case Arrivals::kDiurnal:
      return 1 + 0.8 * std::sin(2 * std::numbers::pi * phase);
  }
  return 1;
}

std::vector<std::string_view> Words(std::string_view line) {
  std::vector<std::string_view> words;
  while (line.find_first_not_of(" \t\r") != line.npos) {
    line.remove_prefix(line.find_first_not_of(" \t\r"));
    words.push_back(line.substr(0, line.find_first_of(" \t\r")));
    line.remove_prefix(words.back().size());
  }
  return words;
}

template <typename Number>
bool Read(std::string_view word, Number least, Number most, Number* value) {
  const char* const end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, *value);
  return error == std::errc() && stop == end && *value >= least && *value <= most;
}

std::string ReadLine(std::span<const std::string_view> words, Traffic* traffic) {
  double seconds = 0;
  if (words.size() < 2 || !Read(words[1], 0.0, kMostSeconds, &seconds)) {
    return "expected call or memory, and seconds";
  }
  if (words[0] == "memory") {
    MemoryShock shock{.at = At(seconds)};
    if (words.size() != 3 || !Read(words[2], 0.0, 1.0, &shock.share)) {
      return "expected memory SECONDS SHARE, a share of 0 to 1";
    }
    traffic->shocks.push_back(shock);
    return "";
  }
  SimCall call{.arrival = At(seconds)};
  if (words[0] != "call" || words.size() < 4 || words.size() > 5 ||
      !Read(words[2], 1, kMostTokens, &call.prompt) ||
      !Read(words[3], 1, kMostTokens, &call.output) ||
      (words.size() == 5 && !Read(words[4], -100, 100, &call.priority))) {
    return "expected call SECONDS PROMPT OUTPUT [PRIORITY]";
  }
  traffic->calls.push_back(call);
  return "";
}

}  // namespace

Traffic MakeTraffic(const TrafficOptions& options) {
  Draws arrivals(options.seed), lengths(options.seed + 1), memory(options.seed + 2);
  Traffic traffic;
  // Thinning: candidates at the highest rate, each taken with the chance that it is due.
  const double highest = options.arrivals == Arrivals::kPoisson ? 1 : kHighest;
  for (double at = 0;;) {
    at += arrivals.Exponential(1 / (options.rate * highest));
    if (at >= options.seconds) break;
    if (arrivals.Uniform() >= RateAt(options, at) / highest) continue;
    traffic.calls.push_back({.arrival = At(at),
                             .prompt = lengths.Length(options.prompt),
                             .output = lengths.Length(options.output),
                             .priority = lengths.Uniform() < options.low_priority ? -1 : 0});
  }
  if (options.shock_every_s > 0) {
    bool taken = false;
    for (double at = memory.Exponential(options.shock_every_s); at < options.seconds;
         at += memory.Exponential(options.shock_every_s)) {
      taken = !taken;
      const double share = taken ? 1 - options.most_taken * memory.Uniform() : 1;
      traffic.shocks.push_back({.at = At(at), .share = share});
    }
  }
  return traffic;
}

Traffic RapTraffic(const BlockTask& scenario, double gap_s) {
  const int output = std::max(1, scenario.length / 4);
  Traffic traffic;
  for (size_t i = 0; i < std::size(kRapBudgets); ++i) {
    const Instant at = At(static_cast<double>(i) * gap_s);
    traffic.shocks.push_back({.at = at, .share = kRapBudgets[i]});
    traffic.calls.insert(
        traffic.calls.end(), scenario.batch,
        {.arrival = at, .prompt = std::max(1, scenario.length - output), .output = output});
  }
  return traffic;
}

bool ParseTraffic(std::string_view text, Traffic* traffic, std::string* error) {
  Traffic read;
  for (int number = 1; !text.empty(); ++number) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    line = line.substr(0, line.find('#'));
    const std::vector<std::string_view> words = Words(line);
    if (words.empty()) continue;
    const std::string wrong = ReadLine(words, &read);
    if (wrong.empty()) continue;
    *error = "line " + std::to_string(number) + ": " + wrong;
    return false;
  }
  std::ranges::stable_sort(read.calls, {}, &SimCall::arrival);
  std::ranges::stable_sort(read.shocks, {}, &MemoryShock::at);
  *traffic = std::move(read);
  return true;
}

}  // namespace espalier
