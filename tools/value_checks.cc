#include "tools/value_checks.h"

#include <fmt/format.h>

#include <charconv>
#include <cstdint>
#include <utility>

namespace espalier {
namespace {

// `fits` is asked about numbers only.
template <typename Fits>
CLI::Validator Number(std::string shown, Fits fits) {
  const auto check = [shown, fits](std::string& text) -> std::string {
    double number = 0;
    if (CLI::detail::lexical_cast(text, number) && fits(number)) return "";
    return fmt::format("expected a {}, got {}", shown, text);
  };
  return CLI::Validator(check, shown);
}

}  // namespace

CLI::Validator Within(double low, double high, std::string shown) {
  if (shown.empty()) shown = fmt::format("FLOAT in [{} - {}]", low, high);
  return Number(std::move(shown),
                [low, high](double number) { return number >= low && number <= high; });
}

CLI::Validator AboveZero(double high) {
  return Number(fmt::format("FLOAT in [above 0 - {}]", high),
                [high](double number) { return number <= high && static_cast<float>(number) > 0; });
}

CLI::Validator Unsigned64() {
  const std::string shown = fmt::format("INT in [0 - {}]", UINT64_MAX);
  const auto check = [shown](std::string& text) -> std::string {
    uint64_t number = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, number);
    if (error == std::errc() && stop == end) return "";
    return fmt::format("expected an {}, got {}", shown, text);
  };
  return CLI::Validator(check, shown);
}

CLI::Validator Bytes(size_t most) {
  const auto check = [most](std::string& text) -> std::string {
    if (!text.empty() && text.size() <= most) return "";
    return fmt::format("expected 1 to {} bytes, got {}", most, text.size());
  };
  return CLI::Validator(check, "");
}

}  // namespace espalier
