#include "engine/weight_keeper.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace espalier {

WeightKeeper::WeightKeeper(const Options& options, int rungs, Releasable releasable)
    : options_(options),
      all_(UpTo(rungs - 1)),
      releasable_(std::move(releasable)),
      present_(all_) {}

Instant WeightKeeper::dwell() const {
  const double seconds = std::max(options_.dwell_s, options_.returns_per_dwell * return_s_);
  return std::chrono::duration_cast<Instant>(std::chrono::duration<double>(seconds));
}

RungSet WeightKeeper::Closure(RungSet served) const {
  const int worth = releasable_(served);
  RungSet closure = served;
  for (RungSet rung = 1; rung != 0 && (rung & all_) != 0; rung <<= 1) {
    if (releasable_(served | rung) == worth) closure |= rung;
  }
  return closure;
}

RungSet WeightKeeper::Least(const RungUse& use) const {
  const RungSet needed = use.running != 0 ? use.running : use.wished;
  return needed == 0 ? present_ : Closure(needed);
}

RungSet WeightKeeper::Decide(Instant now, const RungUse& use, int64_t pages, int pages_whole) {
  const auto with_room = [&](int64_t needed) {
    const auto room = static_cast<int64_t>(std::ceil(options_.room * static_cast<double>(needed)));
    return std::min<int64_t>(pages_whole, needed + room);
  };
  const auto fit = [&](RungSet served) { return pages + releasable_(served); };
  if (present_ != all_) {
    const bool roomy = pages >= with_room(use.pages_needed);
    if (!roomy) {
      roomy_since_ = kNever;
    } else if (roomy_since_ == kNever) {
      roomy_since_ = now;
    }
    if (roomy && now - roomy_since_ >= dwell()) return all_;
  }
  const int64_t next = use.pages_used + use.pages_of_head;
  if ((use.wished & ~present_) != 0) {
    const RungSet more = Closure(present_ | use.wished);
    if (fit(more) >= with_room(next)) return more;
    const RungSet other = Closure(use.wished);
    // Whoever was accepted is served, whatever there is.
    if (use.running == 0 && (use.head & present_) == 0) return other;
    const bool due = changed_ == kNever || now - changed_ >= dwell();
    return due && fit(other) >= use.pages_used ? other : present_;
  }
  RungSet wanted = use.running | use.wished;
  if (wanted == 0) wanted = 1;  // who comes is most likely served the full model
  if (std::min<int64_t>(next, pages_whole) > fit(present_)) {
    const RungSet fewer = Closure(wanted);
    if (releasable_(fewer) > releasable_(present_)) return fewer;
  }
  return present_;
}

void WeightKeeper::Done(RungSet present, Instant now, double seconds) {
  if ((present & ~present_) != 0) return_s_ = seconds;
  present_ = present;
  changed_ = now;
  roomy_since_ = kNever;
}

Instant WeightKeeper::next() const {
  return roomy_since_ == kNever ? kNever : roomy_since_ + dwell();
}

}  // namespace espalier
