#include "server/inbox.h"

#include <fmt/format.h>

#include <chrono>

#include "server/steady_clock.h"

namespace espalier {

Reservation::~Reservation() {
  if (inbox_ != nullptr) inbox_->GiveBack(generation_);
}

bool Reservation::Submit(Submission submission) && {
  submission.generation = generation_;
  return std::exchange(inbox_, nullptr)->Submit(std::move(submission));
}

absl::StatusOr<Reservation> Inbox::Reserve(int priority, int* waiting) {
  std::lock_guard lock(mutex_);
  if (closed_) return absl::UnavailableError("the server takes no new requests");
  ++arrivals_;
  const int taken = reserved_ + submitted_ + in_scheduler_;
  if (waiting != nullptr) *waiting = taken;
  const bool refused = refused_priority_.has_value() && priority <= *refused_priority_;
  if (taken >= max_waiting_ || (refused && taken > 0)) {
    return absl::ResourceExhaustedError(
        fmt::format("{} requests wait, {} may", taken, max_waiting_));
  }
  ++reserved_;
  ++arriving_[generation_ & 1];
  return Reservation(this, generation_);
}

bool Inbox::Submit(Submission submission) {
  std::lock_guard lock(mutex_);
  --reserved_;
  if (closed_) {
    Arrived(submission.generation);
    return false;
  }
  ++submitted_;
  commands_.emplace_back(std::move(submission));
  changed_.notify_one();
  return true;
}

void Inbox::GiveBack(int generation) {
  std::lock_guard lock(mutex_);
  --reserved_;
  Arrived(generation);
}

void Inbox::Arrived(int generation) {
  // Who waits for the last of a generation does so in Take.
  if (--arriving_[generation & 1] > 0 || generation == generation_) return;
  woken_ = true;
  changed_.notify_one();
}

void Inbox::NextGeneration() {
  std::lock_guard lock(mutex_);
  ++generation_;
}

int Inbox::generation() const {
  std::lock_guard lock(mutex_);
  return generation_;
}

int Inbox::Arriving(int generation) const {
  std::lock_guard lock(mutex_);
  return arriving_[generation & 1];
}

void Inbox::Cancel(RequestId id) {
  std::lock_guard lock(mutex_);
  commands_.emplace_back(Cancellation{id});
  changed_.notify_one();
}

void Inbox::SetRefused(std::optional<int> priority) {
  std::lock_guard lock(mutex_);
  refused_priority_ = priority;
}

void Inbox::Close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  woken_ = true;
  changed_.notify_one();
}

void Inbox::Wake() {
  std::lock_guard lock(mutex_);
  woken_ = true;
  changed_.notify_one();
}

void Inbox::Take(int waiting_in_scheduler, Instant until, std::vector<Command>* commands) {
  commands->clear();
  std::unique_lock lock(mutex_);
  in_scheduler_ = waiting_in_scheduler;
  const auto called = [this] { return !commands_.empty() || woken_; };
  if (until == kNever) {
    changed_.wait(lock, called);
  } else if (until > Instant::zero()) {
    changed_.wait_until(lock, std::chrono::steady_clock::time_point(until), called);
  }
  woken_ = false;
  commands_.swap(*commands);
  for (const Command& command : *commands) {
    if (const auto* taken = std::get_if<Submission>(&command)) --arriving_[taken->generation & 1];
  }
  in_scheduler_ += std::exchange(submitted_, 0);
}

int Inbox::TakeArrivals() {
  std::lock_guard lock(mutex_);
  return std::exchange(arrivals_, 0);
}

bool Inbox::closed() const {
  std::lock_guard lock(mutex_);
  return closed_;
}

int Inbox::arriving() const {
  std::lock_guard lock(mutex_);
  return reserved_ + submitted_;
}

int Inbox::waiting() const {
  std::lock_guard lock(mutex_);
  return reserved_ + submitted_ + in_scheduler_;
}

}  // namespace espalier
