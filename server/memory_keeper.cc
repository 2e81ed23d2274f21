#include "server/memory_keeper.h"

#include <algorithm>
#include <utility>

namespace espalier {
namespace {

// Of the machine's memory, left to others: a kernel that reclaims takes longer than we look.
constexpr uint64_t kLeftShare = 32, kLeftShareStalled = 8;
// Of MachineMemory::stalled: from where on the latter, and until where.
constexpr double kStalled = 0.1, kFlows = 0.02;

}  // namespace

MemoryKeeper::MemoryKeeper(const Options& options, std::function<void(int)> limit, Sources sources)
    : options_(options),
      limit_(std::move(limit)),
      sources_(std::move(sources)),
      budget_(options.budget),
      share_(options.share),
      other_(options.other_bytes),
      weight_pages_(options.weight_pages),
      pages_(options.pages) {}

std::optional<MemoryKeeper::Shares> MemoryKeeper::Look() {
  std::lock_guard lock(mutex_);
  return LookLocked(std::max(1, options_.pages / 20));
}

void MemoryKeeper::SetBudget(uint64_t bytes, double share) {
  std::lock_guard lock(mutex_);
  budget_ = bytes;
  share_ = share;
  LookLocked(1);
}

void MemoryKeeper::SetOther(uint64_t bytes, int weight_pages) {
  std::lock_guard lock(mutex_);
  other_ = bytes;
  weight_pages_ = weight_pages;
  LookLocked(1);
}

uint64_t MemoryKeeper::other() const {
  std::lock_guard lock(mutex_);
  return other_;
}

int MemoryKeeper::weight_pages() const {
  std::lock_guard lock(mutex_);
  return weight_pages_;
}

uint64_t MemoryKeeper::Room(uint64_t held) const {
  std::lock_guard lock(mutex_);
  const MachineMemory machine = sources_.machine();
  uint64_t room = UINT64_MAX;
  if (machine.total > 0) {
    const uint64_t left = LeftLocked(machine);
    room = machine.available - std::min(machine.available, left);
  }
  return budget_ > 0 ? std::min(room, budget_ - std::min(budget_, held)) : room;
}

uint64_t MemoryKeeper::budget() const {
  std::lock_guard lock(mutex_);
  return budget_;
}

int MemoryKeeper::pages() const {
  std::lock_guard lock(mutex_);
  return pages_;
}

uint64_t MemoryKeeper::kv_bytes() const {
  std::lock_guard lock(mutex_);
  return options_.page_bytes * static_cast<uint64_t>(KvPagesLocked(sources_.released()));
}

int MemoryKeeper::KvPagesLocked(uint64_t released) const {
  const int64_t pages = pages_ + static_cast<int64_t>(released / options_.page_bytes);
  return static_cast<int>(std::clamp<int64_t>(pages, 0, options_.pages));
}

uint64_t MemoryKeeper::LeftLocked(const MachineMemory& machine) const {
  return machine.total / (stalled_ ? kLeftShareStalled : kLeftShare);
}

std::optional<MemoryKeeper::Shares> MemoryKeeper::LookLocked(int worth_it) {
  const MachineMemory machine = sources_.machine();
  const uint64_t resident = sources_.resident(), released = sources_.released();
  stalled_ = machine.stalled.value_or(0) >= (stalled_ ? kFlows : kStalled);
  const uint64_t left = LeftLocked(machine);
  // Nothing could be read: no reason to think that there is none.
  uint64_t bytes = UINT64_MAX;
  if (machine.total > 0) bytes = resident + std::max(machine.available, left) - left;
  if (share_ > 0) budget_ = static_cast<uint64_t>(share_ * static_cast<double>(machine.total));
  if (budget_ > 0) bytes = std::min(bytes, budget_);
  // What has been added to the process since is no KV either, beyond what the pool can hold.
  const uint64_t held = resident + released;
  const int kv_pages = std::max(KvPagesLocked(released), sources_.kv_pages());
  const uint64_t most_kv = options_.page_bytes * static_cast<uint64_t>(kv_pages);
  const uint64_t other = std::max(other_, held - std::min(held, most_kv));
  const uint64_t fit = (bytes - std::min(bytes, other)) / options_.page_bytes;
  const uint64_t missing =
      (other - std::min(bytes, other) + options_.page_bytes - 1) / options_.page_bytes;
  const int pages =
      static_cast<int>(std::min<uint64_t>(fit, options_.pages)) -
      static_cast<int>(std::min<uint64_t>(missing, static_cast<uint64_t>(weight_pages_)));
  const bool told = pages <= pages_ - std::max(1, worth_it / 10) || pages >= pages_ + worth_it ||
                    (pages == options_.pages && pages > pages_);
  if (told) {
    pages_ = pages;
    limit_(pages);
  }
  if (machine.total == 0) return std::nullopt;
  const auto share = [](uint64_t part, uint64_t whole) {
    return static_cast<double>(std::min(part, whole)) /
           static_cast<double>(std::max<uint64_t>(whole, 1));
  };
  const uint64_t taken = machine.total - std::min(machine.total, machine.available);
  return Shares{.free = share(bytes - std::min(bytes, resident), bytes),
                .foreign = share(taken - std::min(taken, resident), machine.total)};
}

}  // namespace espalier
