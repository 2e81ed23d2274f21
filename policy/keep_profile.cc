#include "policy/keep_profile.h"

#include <algorithm>
#include <functional>

namespace espalier {

KeepProfile KeepProfile::Dense(const SiteWidths& widths) {
  KeepProfile profile;
  profile.widths_ = widths;
  profile.heads_.assign(widths.layers, widths.heads);
  profile.channels_.assign(widths.layers, widths.channels);
  return profile;
}

void KeepProfile::Keep(int layer, SiteKind kind, int count) {
  if (kind == SiteKind::kHeads) {
    heads_[layer] = std::clamp(count, 0, widths_.heads);
  } else {
    channels_[layer] = std::clamp(count, 0, widths_.channels);
  }
}

bool KeepProfile::dense() const {  // asked in every step, so nothing is allocated
  return std::ranges::all_of(heads_, [&](int kept) { return kept == widths_.heads; }) &&
         std::ranges::all_of(channels_, [&](int kept) { return kept == widths_.channels; });
}

bool KeepProfile::narrows() const {
  const auto some = [](int full) { return [full](int kept) { return kept > 0 && kept < full; }; };
  return std::ranges::any_of(heads_, some(widths_.heads)) ||
         std::ranges::any_of(channels_, some(widths_.channels));
}

bool KeepProfile::drops() const {
  const auto none = [](int kept) { return kept == 0; };
  return std::ranges::any_of(heads_, none) || std::ranges::any_of(channels_, none);
}

double KeepProfile::prune_ratio() const {
  int64_t kept = 0;
  for (int count : heads_) kept += count;
  for (int count : channels_) kept += count;
  const int64_t full = int64_t{widths_.layers} * (widths_.heads + widths_.channels);
  return full == 0 ? 0.0 : static_cast<double>(full - kept) / static_cast<double>(full);
}

bool KeepProfile::NestedIn(const KeepProfile& other) const {
  if (widths_ != other.widths_) return false;
  return std::equal(heads_.begin(), heads_.end(), other.heads_.begin(), std::less_equal<>()) &&
         std::equal(channels_.begin(), channels_.end(), other.channels_.begin(),
                    std::less_equal<>());
}

}  // namespace espalier
