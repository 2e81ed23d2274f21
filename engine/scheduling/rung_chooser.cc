#include "engine/scheduling/rung_chooser.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "engine/scheduling/invariant.h"

namespace espalier {
namespace {

bool Has(RungSet set, int rung) { return (set >> rung & 1) != 0; }

}  // namespace

RungChooser::RungChooser(const Ladder& ladder, const KvPages& pages, const Policy& policy)
    : ladder_(ladder),
      pages_(pages),
      policy_(policy),
      served_(~RungSet{0} >> (kMostRungs - ladder.size())) {
  for (int rung = 0; rung < ladder.size(); ++rung) {
    const bool same = rung > 0 && pages.layers(rung) == pages.layers(rung - 1) &&  // nested
                      pages.page_tokens(rung) == pages.page_tokens(rung - 1);
    mildest_.push_back(same ? mildest_.back() : rung);
  }
  most_pages_.reserve(ladder.size());
}

RungSet RungChooser::Allowed(const PruneBounds& bounds) const {
  const RungSet allowed = AllowedRungs(bounds, ladder_);
  return bounds.rung.has_value() ? RungSet{1} << HardestIn(allowed, *bounds.rung) : allowed;
}

int64_t RungChooser::MostPages(int rung) const {
  if (most_pages_.empty()) return pages_.pool().total();
  return std::max(most_pages_[rung], Has(served_, rung) ? pages_.pool().total() : 0);
}

RungSet RungChooser::Fitting(const Request& request, RungSet allowed) const {
  RungSet fitting = 0;
  for (int rung = 0; rung < ladder_.size(); ++rung) {
    if (pages_.Pages(request, rung) <= MostPages(rung)) fitting |= RungSet{1} << rung;
  }
  return fitting & allowed;
}

absl::Status RungChooser::CheckFits(const Request& request, RungSet allowed) const {
  if (Fitting(request, allowed) != 0) return absl::OkStatus();
  const auto missing = [&](int rung) { return pages_.Pages(request, rung) - MostPages(rung); };
  int nearest = std::countr_zero(allowed);
  for (int rung = nearest + 1; rung < ladder_.size(); ++rung) {
    if (Has(allowed, rung) && missing(rung) < missing(nearest)) nearest = rung;
  }
  return absl::ResourceExhaustedError(fmt::format(
      "memory: {} + {} tokens take {} KV pages at rung {}, and there may be {} at present of {}",
      request.prompt.size(), request.stop.max_tokens, pages_.Pages(request, nearest), nearest,
      MostPages(nearest), pages_.geometry().pages));
}

int RungChooser::PolicyRung(const Sequence& sequence) const {
  const Request& request = sequence.request;
  if (request.bounds.rung.has_value()) return std::countr_zero(sequence.allowed);  // the only one
  const int rung = policy_.ChooseRung(TraitsOf(sequence));
  Invariant(rung >= 0 && rung < ladder_.size() && Has(sequence.allowed, rung),
            "policy {} chose rung {} of {} for request {}, against its bounds", policy_.name(),
            rung, ladder_.size(), request.id);
  return rung;
}

int RungChooser::Nearest(const Sequence& sequence, RungSet rungs) const {
  const int rung = PolicyRung(sequence);
  const RungSet harder = rungs >> rung;
  return harder != 0 ? rung + std::countr_zero(harder) : HardestIn(rungs, rung);
}

RungSet RungChooser::Open(const Sequence& sequence) const {
  RungSet fitting = Fitting(sequence.request, sequence.allowed);
  if (sequence.state == Sequence::State::kWaiting) return fitting != 0 ? fitting : sequence.allowed;
  // Who fits nowhere near stays within what is allowed.
  if (!Has(fitting, sequence.rung)) fitting = sequence.allowed;
  return fitting & (~RungSet{0} << mildest_[sequence.rung]);
}

int RungChooser::Choose(const Sequence& sequence) const {
  const RungSet open = Open(sequence), served = open & served_;
  const int rung = Nearest(sequence, open);
  const int milder = HardestIn(served, rung);
  return milder >= 0 || served == 0 ? milder : std::countr_zero(served);
}

bool RungChooser::HeldByWeights(const Sequence& sequence) const {
  return std::popcount(served_) < ladder_.size() && sequence.state == Sequence::State::kRunning &&
         sequence.rung != Wished(sequence);
}

int64_t RungChooser::LeastPages(const Sequence& sequence) const {
  if (sequence.state == Sequence::State::kRunning) {
    return pages_.Pages(sequence.request, sequence.rung);
  }
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int rung = 0; rung < ladder_.size(); ++rung) {
    if (Has(sequence.allowed, rung)) least = std::min(least, pages_.Pages(sequence.request, rung));
  }
  return least;
}

}  // namespace espalier
