#include "engine/scheduling/rung_chooser.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "engine/scheduling/invariant.h"

namespace espalier {
namespace {

// `rung`, or the nearest of the set, a harder one if there is any.
int NearestUp(RungSet set, int rung) {
  const RungSet harder = set >> rung;
  return harder != 0 ? rung + std::countr_zero(harder) : HardestIn(set, rung);
}

// The same, a milder one if there is any.
int NearestDown(RungSet set, int rung) {
  const int milder = HardestIn(set, rung);
  return milder >= 0 ? milder : std::countr_zero(set);
}

}  // namespace

RungChooser::RungChooser(const Ladder& ladder, const KvPages& pages, const Policy& policy)
    : ladder_(ladder),
      pages_(pages),
      policy_(policy),
      in_memory_(UpTo(ladder.size() - 1)),
      limit_(pages.pool().total()) {
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

int RungChooser::MostPages(int rung) const {
  if (most_pages_.empty()) return limit_;
  return std::max(most_pages_[rung], Has(in_memory_, rung) ? limit_ : 0);
}

RungSet RungChooser::Fitting(int64_t tokens, RungSet rungs) const {
  // KV falls along the ladder. Every running sequence asks, before each step.
  const int mildest = std::countr_zero(rungs);
  if ((rungs & ~in_memory_) == 0 && pages_.Pages(tokens, mildest) <= limit_) return rungs;
  RungSet fitting = 0;
  for (RungSet left = rungs; left != 0; left &= left - 1) {
    const int rung = std::countr_zero(left);
    if (pages_.Pages(tokens, rung) <= MostPages(rung)) fitting |= RungSet{1} << rung;
  }
  return fitting;
}

RungSet RungChooser::WithinPolicy(const Request& request, RungSet rungs) const {
  if (request.bounds.rung.has_value()) return rungs;
  return rungs & UpTo(std::min(policy_.hardest_served(), kMostRungs - 1));
}

RungSet RungChooser::LeastKv(RungSet rungs) const {
  return rungs & (~RungSet{0} << mildest_[std::bit_width(rungs) - 1]);  // nested
}

absl::Status RungChooser::CheckFits(const Request& request, RungSet allowed) const {
  const RungSet rungs = WithinPolicy(request, allowed);
  if (Fitting(request.tokens(), rungs) != 0) return absl::OkStatus();
  const auto missing = [&](int rung) { return pages_.Pages(request, rung) - MostPages(rung); };
  int nearest = std::countr_zero(rungs);
  for (int rung = nearest + 1; rung < ladder_.size(); ++rung) {
    if (Has(rungs, rung) && missing(rung) < missing(nearest)) nearest = rung;
  }
  return absl::ResourceExhaustedError(fmt::format(
      "memory: {} + {} tokens take {} KV pages at rung {}, and there may be {} at present of {}",
      request.prompt.size(), request.stop.max_tokens, pages_.Pages(request, nearest), nearest,
      MostPages(nearest), pages_.geometry().pages));
}

int64_t RungChooser::LeastPages(const Request& request) const {
  const RungSet rungs = WithinPolicy(request, Allowed(request.bounds));
  return pages_.Pages(request, std::bit_width(rungs) - 1);
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

RungSet RungChooser::Reach(const Sequence& sequence) const {
  const bool runs = sequence.state == Sequence::State::kRunning;
  const RungSet rungs = sequence.allowed & (~RungSet{0} << (runs ? mildest_[sequence.rung] : 0));
  const RungSet served = WithinPolicy(sequence.request, rungs);
  return served != 0 ? served : rungs & -rungs;  // the mildest
}

RungSet RungChooser::Open(const Sequence& sequence) const {
  const bool runs = sequence.state == Sequence::State::kRunning;
  const RungSet reach = Reach(sequence);
  const RungSet fitting = Fitting(runs ? sequence.size() : sequence.request.tokens(), reach);
  return fitting != 0 ? fitting : LeastKv(reach);
}

int RungChooser::Wished(const Sequence& sequence) const {
  return NearestUp(Open(sequence), PolicyRung(sequence));
}

int RungChooser::Choose(const Sequence& sequence) const {
  const RungSet open = Open(sequence), there = open & in_memory_;
  const int rung = PolicyRung(sequence);
  if (there != 0) return NearestDown(there, NearestUp(open, rung));
  if (sequence.state == Sequence::State::kWaiting) return -1;
  if (const RungSet others = Reach(sequence) & in_memory_; others != 0) {
    return NearestUp(LeastKv(others), rung);
  }
  return Has(in_memory_, sequence.rung) ? sequence.rung : -1;
}

bool RungChooser::HeldByMemory(const Sequence& sequence) const {
  return Wished(sequence) != NearestUp(Reach(sequence), PolicyRung(sequence));
}

bool RungChooser::HeldByWeights(const Sequence& sequence) const {
  return std::popcount(in_memory_) < ladder_.size() &&
         sequence.state == Sequence::State::kRunning && sequence.rung != Wished(sequence);
}

}  // namespace espalier
