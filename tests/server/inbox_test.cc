#include "server/inbox.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "server/steady_clock.h"
#include "server/token_stream.h"

namespace espalier {
namespace {

Submission Numbered(RequestId id) { return {.request = {.id = id, .prompt = {1}}}; }

TEST(Inbox, ReservationHoldsItsPlaceUntilTheSchedulerRunsIt) {
  Inbox inbox(2);
  absl::StatusOr<Reservation> first = inbox.Reserve(0);
  ASSERT_TRUE(first.ok());
  {
    absl::StatusOr<Reservation> second = inbox.Reserve(0);
    ASSERT_TRUE(second.ok());
    int waiting = 0;
    EXPECT_EQ(inbox.Reserve(0, &waiting).status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(waiting, 2);
  }
  EXPECT_TRUE(inbox.Reserve(0).ok()) << "the unused place came back";

  EXPECT_TRUE((*std::move(first)).Submit(Numbered(1)));
  EXPECT_EQ(inbox.waiting(), 1);
  std::vector<Command> commands;
  inbox.Take(0, Instant::zero(), &commands);
  EXPECT_EQ(commands.size(), 1u);
  EXPECT_EQ(inbox.waiting(), 1) << "it is with the scheduler, and waits there";
  EXPECT_EQ(inbox.arriving(), 0);
  inbox.Take(0, Instant::zero(), &commands);
  EXPECT_EQ(inbox.waiting(), 0) << "the scheduler said that nothing waits";
}

TEST(Inbox, KeepsTheOrderOfCommands) {
  Inbox inbox(8);
  for (RequestId id = 1; id <= 3; ++id) {
    absl::StatusOr<Reservation> place = inbox.Reserve(0);
    ASSERT_TRUE(place.ok() && (*std::move(place)).Submit(Numbered(id)));
    inbox.Cancel(id);
  }
  std::vector<Command> commands;
  inbox.Take(0, Instant::zero(), &commands);
  std::vector<int> order;
  for (const Command& command : commands) {
    if (const auto* cancellation = std::get_if<Cancellation>(&command)) {
      order.push_back(-static_cast<int>(cancellation->id));
    } else {
      order.push_back(static_cast<int>(std::get<Submission>(command).request.id));
    }
  }
  EXPECT_THAT(order, testing::ElementsAre(1, -1, 2, -2, 3, -3));
}

TEST(Inbox, ClosedTakesNoNewcomersButStillCancels) {
  Inbox inbox(8);
  absl::StatusOr<Reservation> place = inbox.Reserve(0);
  ASSERT_TRUE(place.ok());
  inbox.Close();
  EXPECT_EQ(inbox.Reserve(0).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE((*std::move(place)).Submit(Numbered(1)));
  inbox.Cancel(7);
  std::vector<Command> commands;
  inbox.Take(0, kNever, &commands);
  EXPECT_EQ(commands.size(), 1u);
  EXPECT_EQ(inbox.waiting(), 0);
}

TEST(Inbox, TakeWaitsForACommandAWakeOrItsTime) {
  Inbox inbox(8);
  std::vector<Command> commands;
  const Instant before = SteadyNow();
  inbox.Take(0, before + std::chrono::milliseconds(5), &commands);
  EXPECT_GE(SteadyNow() - before, std::chrono::milliseconds(5));
  EXPECT_TRUE(commands.empty());

  std::thread waker([&] { inbox.Wake(); });
  inbox.Take(0, kNever, &commands);
  waker.join();
  EXPECT_TRUE(commands.empty());
  std::thread canceller([&] { inbox.Cancel(1); });
  inbox.Take(0, kNever, &commands);
  canceller.join();
  EXPECT_EQ(commands.size(), 1u);
}

// Many callers burst in while the engine takes: at no moment are there more than the bound.
TEST(Inbox, BurstNeverLeaksPastTheBound) {
  constexpr int kBound = 5;
  constexpr int kCallers = 8;
  Inbox inbox(kBound);
  std::atomic<int> admitted = 0, refused = 0, callers_left = kCallers;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int i = 0; i < 500; ++i) {
        absl::StatusOr<Reservation> place = inbox.Reserve(0);
        if (!place.ok()) {
          ++refused;
          continue;
        }
        if (i % 7 == 0) continue;  // changed its mind
        ASSERT_TRUE((*std::move(place)).Submit(Numbered(caller * 1000 + i)));
        ++admitted;
      }
      --callers_left;
      inbox.Wake();
    });
  }
  while (refused == 0) std::this_thread::yield();
  std::vector<Command> commands;
  int taken = 0, waiting = 0;
  bool all_left = false;
  do {
    all_left = callers_left == 0;
    inbox.Take(waiting, SteadyNow() + std::chrono::milliseconds(1), &commands);
    taken += static_cast<int>(commands.size());
    EXPECT_LE(waiting + static_cast<int>(commands.size()), kBound);
    EXPECT_LE(inbox.waiting(), kBound);
    // Some wait a round with the scheduler, some run at once.
    waiting = static_cast<int>(commands.size()) / 2;
  } while (!all_left || !commands.empty());
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(taken, admitted);
}

TEST(Inbox, RefusesWhileSomebodyWaitsWhomItIsToldTo) {
  Inbox inbox(4);
  inbox.SetRefused(0);
  absl::StatusOr<Reservation> first = inbox.Reserve(0);
  EXPECT_TRUE(first.ok()) << "nobody waits";
  int waiting = 0;
  EXPECT_TRUE(absl::IsResourceExhausted(inbox.Reserve(0, &waiting).status()));
  EXPECT_EQ(waiting, 1);
  EXPECT_TRUE(absl::IsResourceExhausted(inbox.Reserve(-1).status()));
  EXPECT_TRUE(inbox.Reserve(1).ok());
  inbox.SetRefused(std::nullopt);
  EXPECT_TRUE(inbox.Reserve(0).ok());
  EXPECT_EQ(inbox.TakeArrivals(), 5) << "whoever asked";
  EXPECT_EQ(inbox.TakeArrivals(), 0);
}

}  // namespace
}  // namespace espalier
