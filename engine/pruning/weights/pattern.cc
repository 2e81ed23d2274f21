#include "engine/pruning/weights/pattern.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <system_error>

namespace espalier {
namespace {

template <typename Number>
std::optional<Number> Whole(std::string_view text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

}  // namespace

int64_t Pattern::PrunedOf(int64_t columns) const {
  if (!grouped()) return std::llround(sparsity * static_cast<double>(columns));
  return columns / group * (group - keep) + std::max<int64_t>(columns % group - keep, 0);
}

std::string Pattern::name() const {
  return grouped() ? fmt::format("{}:{}", keep, group) : fmt::format("{}", sparsity);
}

std::optional<Pattern> ParsePattern(std::string_view text) {
  const size_t colon = text.find(':');
  if (colon == std::string_view::npos) {
    const std::optional<double> share = Whole<double>(text);
    if (!share || !(*share > 0 && *share < 1)) return std::nullopt;
    return Pattern{.sparsity = *share};
  }
  const std::optional<int> keep = Whole<int>(text.substr(0, colon));
  const std::optional<int> group = Whole<int>(text.substr(colon + 1));
  if (!keep || !group || *keep < 1 || *group <= *keep || *group > kMaxGroup) return std::nullopt;
  return Pattern{
      .sparsity = 1 - static_cast<double>(*keep) / *group, .keep = *keep, .group = *group};
}

}  // namespace espalier
