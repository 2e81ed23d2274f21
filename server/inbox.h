// The one door to the engine thread: a bounded queue of requests, and cancellations.
//
// A request holds a place from before it is tokenised until the scheduler first runs it. Places are
// counted under the lock that grants them, so a burst cannot slip past the bound; and there it is
// settled on which generation of the model a request will run.
#pragma once

#include <array>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/scheduling/request.h"

namespace espalier {

class Inbox;
class TokenStream;

struct Submission {
  Request request;
  std::shared_ptr<TokenStream> stream;  // where its tokens go
  int generation = 0;                   // of its place; filled in by Reservation::Submit
};

struct Cancellation {
  RequestId id = 0;
};

using Command = std::variant<Submission, Cancellation>;

// A granted place. Given back on destruction unless it was used.
class Reservation {
 public:
  Reservation(Reservation&& other) noexcept
      : inbox_(std::exchange(other.inbox_, nullptr)), generation_(other.generation_) {}
  Reservation& operator=(Reservation&&) = delete;
  ~Reservation();

  // Hands the request to the engine thread. False if the inbox was closed meanwhile.
  bool Submit(Submission submission) &&;

  int generation() const { return generation_; }

 private:
  friend class Inbox;
  Reservation(Inbox* inbox, int generation) : inbox_(inbox), generation_(generation) {}

  Inbox* inbox_;
  int generation_;
};

class Inbox {
 public:
  // At most `max_waiting` (>= 1) requests that the scheduler does not run yet.
  explicit Inbox(int max_waiting) : max_waiting_(max_waiting) {}

  // ResourceExhausted if full, or refused by its priority, Unavailable once closed. Any thread.
  // `waiting`: places that were taken when this was decided.
  absl::StatusOr<Reservation> Reserve(int priority, int* waiting = nullptr);

  // Never refused: who is in must be able to leave. Any thread.
  void Cancel(RequestId id);

  // From now on, and as long as somebody waits, no new places for who has this priority or a lower
  // one; nothing: for all. Any thread.
  void SetRefused(std::optional<int> priority);

  // Places are of the next generation from now on, 0 being the first. Not before Arriving says 0 of
  // the one before this. Any thread.
  void NextGeneration();
  int generation() const;
  // Places of this generation, the present or the one before, that Take has not emptied.
  int Arriving(int generation) const;

  // No new places; what was submitted stays. Any thread.
  void Close();

  // Makes a blocked Take return. Any thread.
  void Wake();

  // Engine thread: says how many requests the scheduler keeps waiting, and moves all commands to
  // `commands` in the order they came. Without a command it waits for one, Close or Wake, until
  // `until` (kNever: without end; zero: not at all).
  void Take(int waiting_in_scheduler, Instant until, std::vector<Command>* commands);

  // How many asked for a place since this was last asked. Any thread.
  int TakeArrivals();

  int max_waiting() const { return max_waiting_; }
  bool closed() const;
  // Places taken by what the scheduler has not seen yet.
  int arriving() const;
  // All places taken.
  int waiting() const;

 private:
  friend class Reservation;
  bool Submit(Submission submission);
  void GiveBack(int generation);
  void Arrived(int generation);  // under the lock

  const int max_waiting_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Command> commands_;
  int reserved_ = 0;   // places granted, not yet submitted
  int submitted_ = 0;  // submissions among commands_
  int generation_ = 0;
  std::array<int, 2> arriving_ = {};  // reserved_ + submitted_, of even and odd generations
  int in_scheduler_ = 0;
  int arrivals_ = 0;
  std::optional<int> refused_priority_;
  bool closed_ = false;
  bool woken_ = false;
};

}  // namespace espalier
