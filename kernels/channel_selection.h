// Which channels of one prunable dimension take part in a product: all of them, or a list.
//
// A prunable channel is a row in every weight that touches it, so a selection is a list
// of weight rows. Dense is `All(n)`: a value, not a special case.
#pragma once

#include <cstdint>
#include <span>

namespace espalier {

class ChannelSelection {
 public:
  // Every one of `n` channels, in natural order.
  static ChannelSelection All(int n) { return ChannelSelection(n); }

  // The listed channels, in the order listed (a ranking's prefix, so not necessarily ascending).
  // The list must outlive the selection; each entry is in [0, rows of the weight), none twice.
  static ChannelSelection Of(std::span<const int32_t> channels) {
    return ChannelSelection(channels);
  }

  int count() const { return count_; }
  bool all() const { return all_; }

  // The weight row of the i-th selected channel, i in [0, count()).
  int operator[](int i) const { return all_ ? i : list_[i]; }

  // What a kernel that gathers rows is handed: [count()] rows, or null for all.
  const int32_t* list() const { return all_ ? nullptr : list_.data(); }

 private:
  explicit ChannelSelection(int count) : count_(count), all_(true) {}
  explicit ChannelSelection(std::span<const int32_t> list)
      : count_(static_cast<int>(list.size())), all_(false), list_(list) {}

  int count_;
  bool all_;
  std::span<const int32_t> list_;
};

}  // namespace espalier
