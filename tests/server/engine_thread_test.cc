#include "server/engine_thread.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "server/steady_clock.h"
#include "server/watchdog.h"
#include "tests/server/paced_executor.h"

namespace espalier {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Collects a stream; optionally refuses to read at all.
class Reader final : public StreamReader {
 public:
  explicit Reader(bool reads = true) : reads_(reads) {}

  void OnReady() override {
    if (!reads_) return;
    std::lock_guard lock(mutex_);
    TokenStream::Pending pending;
    stream->Drain(&pending);
    for (const TokenResult& token : pending.tokens) tokens_.push_back(token.token);
    scores_ += pending.prompt_scores.size();
    if (pending.end.has_value()) end_ = std::move(pending.end);
    changed_.notify_all();
  }

  // The end, or nothing after 20 s.
  std::optional<StreamEnd> WaitForEnd() {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, seconds(20), [this] { return end_.has_value(); });
    return end_;
  }
  // False if it ended, or 20 s went by, with fewer.
  bool WaitForTokens(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, seconds(20),
                      [&] { return tokens_.size() >= count || end_.has_value(); });
    return tokens_.size() >= count;
  }
  std::vector<int32_t> tokens() {
    std::lock_guard lock(mutex_);
    return tokens_;
  }
  size_t scores() {
    std::lock_guard lock(mutex_);
    return scores_;
  }

  std::shared_ptr<TokenStream> stream;

 private:
  const bool reads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int32_t> tokens_;
  size_t scores_ = 0;
  std::optional<StreamEnd> end_;
};

class Refuses final : public Policy {
 public:
  int ChooseRung(const RequestTraits& /*traits*/) const override { return 0; }
  std::string_view name() const override { return "refuses"; }
  double refuses_behind_s() const override { return 0; }
};

class EngineThreadTest : public testing::Test {
 protected:
  void Start(int max_waiting = 256, SchedulerOptions options = {.max_waiting = 1 << 20},
             KvGeometry geometry = {.layers = 2, .pages = 4096, .context = 4096},
             QualityCheck* quality = nullptr, Policy* policy = nullptr) {
    paced_ = std::make_unique<PacedEngine>(options, geometry, policy);
    thread_ = std::make_unique<EngineThread>(
        &paced_->engine, &ready_, max_waiting,
        EngineHooks{
            .on_step =
                [this](const StepReport&, const LoadSnapshot& load, const StepTimes& times) {
                  ++reports_;
                  std::lock_guard lock(mutex_);
                  steps_.push_back({load.steps, load.stats, times.token_gaps.size()});
                },
            .on_lost = [this](const absl::Status&) { lost_ = true; },
            .quality = quality,
            .on_check = [this] { ++checks_; }});
  }

  std::shared_ptr<Reader> Offer(Request request, size_t capacity = TokenStream::kUnbounded,
                                bool reads = true) {
    absl::StatusOr<Reservation> place = thread_->inbox().Reserve(0);
    if (!place.ok()) return nullptr;
    auto reader = std::make_shared<Reader>(reads);
    reader->stream = std::make_shared<TokenStream>(request.id, capacity, reader);
    request.arrival = SteadyNow();
    if (!(*std::move(place)).Submit({std::move(request), reader->stream})) return nullptr;
    return reader;
  }

  static Request Prompt(RequestId id, int max_tokens, int prompt_tokens = 4) {
    return {.id = id,
            .prompt = std::vector<int32_t>(prompt_tokens, static_cast<int32_t>(id)),
            .stop = {.max_tokens = max_tokens}};
  }

  static std::vector<int32_t> Expected(RequestId id, int count) {
    std::vector<int32_t> tokens;
    for (int i = 0; i < count; ++i) tokens.push_back(PacedToken(static_cast<int32_t>(id), i));
    return tokens;
  }

  // Waits until no page is used; false after 20 s.
  bool PagesComeBack() {
    for (const Instant until = SteadyNow() + seconds(20); SteadyNow() < until;) {
      const LoadSnapshot load = thread_->load();
      if (load.stats.running + load.stats.waiting + load.stats.pages_used == 0) return true;
      std::this_thread::sleep_for(milliseconds(1));
    }
    return false;
  }

  Refuses refuses_;
  std::unique_ptr<PacedEngine> paced_;
  ReadyQueue ready_{2};
  std::atomic<int> reports_ = 0;
  std::atomic<int> checks_ = 0;
  struct Step {
    uint64_t number;  // steps since start
    SchedulerStats stats;
    size_t token_gaps;
  };
  std::mutex mutex_;
  std::vector<Step> steps_;
  std::atomic<bool> lost_ = false;
  std::unique_ptr<EngineThread> thread_;  // last: its hooks use the others until it ends
};

// A check runs only while nobody else does, and whoever comes then gets what he would without it.
TEST_F(EngineThreadTest, ChecksQualityWhileNobodyWaitsAndGivesWay) {
  QualityCheck quality({.share = 1, .idle_s = 0.001}, PacedEngine::Rungs());
  Start(256, {.max_batch_tokens = 8, .max_waiting = 1 << 20},
        {.layers = 2, .pages = 4096, .context = 4096}, &quality);
  paced_->executor.set_step_time(milliseconds(1));
  std::mt19937 random(1);
  RequestId id = 0;
  for (const Instant until = SteadyNow() + seconds(20); checks_ < 20 && SteadyNow() < until;) {
    const auto reader = Offer(Prompt(++id, 5, 40));
    ASSERT_EQ(reader->WaitForEnd()->cause, StreamEnd::Cause::kFinished);
    EXPECT_EQ(reader->tokens(), Expected(id, 5));
    // Long enough for none, one or both of a check's passes.
    std::this_thread::sleep_for(milliseconds(random() % 25));
  }
  EXPECT_GE(checks_, 20);
  EXPECT_TRUE(thread_->Drain(seconds(10)));
}

TEST_F(EngineThreadTest, StreamsEveryTokenInOrder) {
  Start();
  std::vector<std::shared_ptr<Reader>> readers;
  for (RequestId id = 1; id <= 20; ++id) readers.push_back(Offer(Prompt(id, 50 + int(id))));
  for (RequestId id = 1; id <= 20; ++id) {
    const std::optional<StreamEnd> end = readers[id - 1]->WaitForEnd();
    ASSERT_TRUE(end.has_value());
    EXPECT_EQ(end->reason, FinishReason::kLength);
    EXPECT_EQ(readers[id - 1]->tokens(), Expected(id, 50 + int(id)));
  }
  EXPECT_TRUE(PagesComeBack());
  const LoadSnapshot load = thread_->load();
  EXPECT_GT(load.generated_tokens_per_second, 0);
  EXPECT_GT(load.finished_per_second, 0);
  EXPECT_GE(reports_, 70);
}

TEST_F(EngineThreadTest, ScoresComeWithTheEnd) {
  Start();
  Request request = Prompt(1, 0, 600);  // more than one prefill chunk
  request.prompt_logprobs = true;
  const auto reader = Offer(std::move(request));
  ASSERT_TRUE(reader->WaitForEnd().has_value());
  EXPECT_EQ(reader->scores(), 599u);
  EXPECT_TRUE(reader->tokens().empty());
}

TEST_F(EngineThreadTest, WhatCanNeverFitIsRefusedWithItsReason) {
  Start();
  const auto reader = Offer(Prompt(1, 5000));
  const std::optional<StreamEnd> end = reader->WaitForEnd();
  ASSERT_TRUE(end.has_value());
  EXPECT_EQ(end->cause, StreamEnd::Cause::kRefused);
  EXPECT_EQ(end->error.code(), absl::StatusCode::kOutOfRange);
}

TEST_F(EngineThreadTest, QueueIsBoundedWhileTheEngineIsBusy) {
  Start(3, {.max_sequences = 1, .max_waiting = 1 << 20});
  paced_->executor.Hold();
  std::vector<std::shared_ptr<Reader>> in;
  for (RequestId id = 1; id <= 10; ++id) {
    if (auto reader = Offer(Prompt(id, 4))) in.push_back(std::move(reader));
  }
  // 3 wait; besides one may run, if the engine took it before the others came.
  EXPECT_GE(in.size(), 3u);
  EXPECT_LE(in.size(), 4u);
  EXPECT_EQ(thread_->inbox().Reserve(0).status().code(), absl::StatusCode::kResourceExhausted);
  paced_->executor.Go();
  for (const auto& reader : in) EXPECT_TRUE(reader->WaitForEnd().has_value());
  EXPECT_TRUE(thread_->inbox().Reserve(0).ok());
}

TEST_F(EngineThreadTest, IdleItRefusesNobodyForThoseBefore) {
  Start(256, {.max_sequences = 1, .max_waiting = 1 << 20},
        {.layers = 2, .pages = 4096, .context = 4096}, nullptr, &refuses_);
  ASSERT_TRUE(Offer(Prompt(1, 1))->WaitForEnd().has_value());
  bool both = false;
  for (int i = 0; i < 5000 && !both; ++i) {  // it may not have found out yet that it is idle
    const absl::StatusOr<Reservation> first = thread_->inbox().Reserve(0);
    both = first.ok() && thread_->inbox().Reserve(0).ok();
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(both);

  paced_->executor.set_step_time(milliseconds(1));
  const auto running = Offer(Prompt(2, 4000));
  ASSERT_TRUE(running->WaitForTokens(1));
  paced_->executor.Hold();
  paced_->executor.WaitForHeldStep();
  EXPECT_NE(Offer(Prompt(3, 1)), nullptr) << "nobody waits";
  paced_->executor.Go();
  bool refused = false;
  for (int i = 0; i < 5000 && !refused; ++i) {  // from the first step on that saw the one who waits
    refused = absl::IsResourceExhausted(thread_->inbox().Reserve(0).status());
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(refused);
  EXPECT_TRUE(thread_->inbox().Reserve(1).ok()) << "it would be served before";
}

TEST_F(EngineThreadTest, ReaderThatStallsIsEndedAndItsPagesComeBack) {
  Start();
  const auto stalled = Offer(Prompt(1, 2000), 16, /*reads=*/false);
  const auto reader = Offer(Prompt(2, 300), 1 << 20);
  ASSERT_TRUE(reader->WaitForEnd().has_value());
  EXPECT_EQ(reader->tokens(), Expected(2, 300));
  EXPECT_TRUE(PagesComeBack());
  EXPECT_TRUE(stalled->stream->stalled());
  TokenStream::Pending pending;
  stalled->stream->Drain(&pending);
  EXPECT_EQ(pending.tokens.size(), 16u);
  ASSERT_TRUE(pending.end.has_value());
  EXPECT_EQ(pending.end->cause, StreamEnd::Cause::kStalled);
}

TEST_F(EngineThreadTest, CancelWorksQueuedInPrefillAndInDecode) {
  Start(256, {.max_batch_tokens = 16, .max_sequences = 2, .max_waiting = 1 << 20});
  paced_->executor.set_step_time(std::chrono::microseconds(500));
  const auto decoding = Offer(Prompt(1, 3000));
  ASSERT_TRUE(decoding->WaitForTokens(5));
  const auto prefilling = Offer(Prompt(2, 10, 3000));
  const auto queued = Offer(Prompt(3, 10));
  while (thread_->load().stats.running < 2) std::this_thread::sleep_for(milliseconds(1));
  thread_->inbox().Cancel(2);
  thread_->inbox().Cancel(3);
  while (thread_->load().stats.running + thread_->load().stats.waiting > 1) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(prefilling->tokens().empty());
  thread_->inbox().Cancel(1);
  thread_->inbox().Cancel(1);   // twice is as once
  thread_->inbox().Cancel(99);  // never heard of
  EXPECT_TRUE(PagesComeBack());
  EXPECT_EQ(decoding->tokens(), Expected(1, static_cast<int>(decoding->tokens().size())));
}

// A cancellation that comes during a step is obeyed before the next one.
TEST_F(EngineThreadTest, PagesOfTheCancelledAreBackWithinOneStep) {
  Start();
  paced_->executor.set_step_time(milliseconds(1));  // or all are done before the step to hold
  constexpr RequestId kClients = 32;
  std::vector<std::shared_ptr<Reader>> readers;
  for (RequestId id = 1; id <= kClients; ++id) readers.push_back(Offer(Prompt(id, 500, 40)));
  for (const auto& reader : readers) ASSERT_TRUE(reader->WaitForTokens(3));
  paced_->executor.Hold();
  paced_->executor.WaitForHeldStep();
  paced_->executor.set_step_time(milliseconds(0));
  const LoadSnapshot before = thread_->load();  // the step that is held is one more
  for (RequestId id = 1; id <= kClients; id += 2) thread_->inbox().Cancel(id);
  paced_->executor.Go();
  for (RequestId id = 2; id <= kClients; id += 2) {
    ASSERT_TRUE(readers[id - 1]->WaitForEnd().has_value());
    EXPECT_EQ(readers[id - 1]->tokens(), Expected(id, 500));
  }
  std::lock_guard lock(mutex_);
  const auto next = std::find_if(steps_.begin(), steps_.end(),
                                 [&](const Step& step) { return step.number == before.steps + 2; });
  ASSERT_NE(next, steps_.end());
  EXPECT_EQ(next->stats.running, kClients / 2);
  // All are as long as each other, to within a page of each layer.
  EXPECT_LE(next->stats.pages_used, before.stats.pages_used / 2 + int{kClients / 2} * 2);
  EXPECT_EQ(next->token_gaps, kClients / 2);
}

TEST_F(EngineThreadTest, CancelBeforeTheEngineSawTheRequest) {
  Start();
  paced_->executor.set_step_time(milliseconds(1));
  const auto first = Offer(Prompt(1, 3000));
  ASSERT_TRUE(first->WaitForTokens(1));
  paced_->executor.Hold();
  const auto second = Offer(Prompt(2, 3000));
  thread_->inbox().Cancel(2);
  thread_->inbox().Cancel(1);
  paced_->executor.Go();
  EXPECT_TRUE(PagesComeBack());
  EXPECT_TRUE(second->tokens().empty());
}

TEST_F(EngineThreadTest, DeadlineEndsQueuedAndRunning) {
  Start(256, {.max_sequences = 1, .max_waiting = 1 << 20});
  paced_->executor.set_step_time(milliseconds(1));
  Request runs = Prompt(1, 3000), waits = Prompt(2, 10);
  runs.deadline = SteadyNow() + milliseconds(100);
  waits.deadline = SteadyNow() + milliseconds(30);
  const auto running = Offer(std::move(runs));
  ASSERT_TRUE(running->WaitForTokens(1));
  const auto waiting = Offer(std::move(waits));
  EXPECT_EQ(waiting->WaitForEnd()->reason, FinishReason::kDeadline);
  EXPECT_TRUE(waiting->tokens().empty());
  EXPECT_EQ(running->WaitForEnd()->reason, FinishReason::kDeadline);
  EXPECT_TRUE(PagesComeBack());
}

TEST_F(EngineThreadTest, DrainLetsTheAcceptedFinish) {
  Start();
  paced_->executor.set_step_time(std::chrono::microseconds(100));
  std::vector<std::shared_ptr<Reader>> readers;
  for (RequestId id = 1; id <= 80; ++id) readers.push_back(Offer(Prompt(id, 40)));
  EXPECT_TRUE(thread_->Drain(seconds(20)));
  EXPECT_EQ(Offer(Prompt(99, 1)), nullptr);
  for (const auto& reader : readers) {
    EXPECT_EQ(reader->WaitForEnd()->cause, StreamEnd::Cause::kFinished);
  }
  EXPECT_TRUE(thread_->load().draining);
}

TEST_F(EngineThreadTest, DrainEndsWhatTakesTooLong) {
  Start();
  paced_->executor.set_step_time(milliseconds(2));
  const auto slow = Offer(Prompt(1, 4000));
  ASSERT_TRUE(slow->WaitForTokens(1));
  EXPECT_FALSE(thread_->Drain(milliseconds(20)));
  EXPECT_EQ(slow->WaitForEnd()->cause, StreamEnd::Cause::kShutdown);
  EXPECT_EQ(thread_->load().stats.pages_used, 0);
}

TEST_F(EngineThreadTest, LostDeviceEndsEveryStreamAndTakesNoMore) {
  Start();
  paced_->executor.set_step_time(milliseconds(1));
  const auto running = Offer(Prompt(1, 4000));
  ASSERT_TRUE(running->WaitForTokens(1));
  paced_->executor.Hold();
  const auto late = Offer(Prompt(2, 10));
  paced_->executor.Break(absl::InternalError("the device fell off the bus"));
  paced_->executor.Go();
  for (const auto& reader : {running, late}) {
    const std::optional<StreamEnd> end = reader->WaitForEnd();
    ASSERT_TRUE(end.has_value());
    EXPECT_EQ(end->cause, StreamEnd::Cause::kLost);
    EXPECT_THAT(end->error.ToString(), testing::HasSubstr("fell off"));
  }
  EXPECT_TRUE(lost_);
  EXPECT_EQ(Offer(Prompt(3, 1)), nullptr);
}

TEST_F(EngineThreadTest, WeightsLostWhileNobodyIsServedAreToldAtOnce) {
  Start();
  paced_->executor.set_panel_pages(100);
  paced_->executor.Break(absl::DataLossError("the file has changed"));
  thread_->LimitPages(-1);
  for (const Instant until = SteadyNow() + seconds(20); !lost_ && SteadyNow() < until;) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(lost_);
  EXPECT_THAT(thread_->lost().ToString(), testing::HasSubstr("file has changed"));
  EXPECT_EQ(Offer(Prompt(1, 1)), nullptr);
}

TEST_F(EngineThreadTest, StalledExecutorIsNoticedOnceAndSoIsItsReturn) {
  Start();
  Watchdog watchdog(milliseconds(60));
  paced_->executor.Hold();
  const auto reader = Offer(Prompt(1, 5));
  paced_->executor.WaitForHeldStep();
  const Instant until = SteadyNow() + seconds(20);
  int changes = 0;
  const auto look = [&] { changes += watchdog.Look(thread_->seconds_without_progress()); };
  for (; changes == 0 && SteadyNow() < until; std::this_thread::sleep_for(watchdog.interval())) {
    look();
  }
  EXPECT_TRUE(watchdog.stuck());
  EXPECT_GT(thread_->seconds_without_progress(), 0.06);
  for (int i = 0; i < 5; ++i) look();
  EXPECT_EQ(changes, 1);

  paced_->executor.Go();
  ASSERT_TRUE(reader->WaitForEnd().has_value());
  while (watchdog.stuck() && SteadyNow() < until) look();
  EXPECT_EQ(changes, 2);
}

// Many steps, each shorter than the bound, are no stall however long they take together; nor is
// having nothing to do.
TEST_F(EngineThreadTest, WorkThatMovesAndIdlenessAreNoStall) {
  Start();
  Watchdog watchdog(milliseconds(500));
  paced_->executor.set_step_time(milliseconds(10));
  const auto reader = Offer(Prompt(1, 80));
  const Instant until = SteadyNow() + milliseconds(1600);
  while (SteadyNow() < until) {
    ASSERT_FALSE(watchdog.Look(thread_->seconds_without_progress()));
    std::this_thread::sleep_for(milliseconds(2));
  }
  ASSERT_TRUE(reader->WaitForEnd().has_value());
  EXPECT_TRUE(PagesComeBack());
  EXPECT_EQ(thread_->seconds_without_progress(), 0);
}

// Who took a place before finishes on the engine there was, whenever his request comes.
TEST_F(EngineThreadTest, ReplacedEngineFinishesWhatItHas) {
  Start();
  paced_->executor.set_step_time(milliseconds(1));
  PacedEngine next;
  const auto running = Offer(Prompt(1, 2000));
  ASSERT_TRUE(running->WaitForTokens(5));
  absl::StatusOr<Reservation> place = thread_->inbox().Reserve(0);
  ASSERT_TRUE(place.ok());
  std::atomic<bool> left = false;
  EXPECT_EQ(thread_->Replace({.engine = &next.engine}, [&] { left = true; }), 2)
      << "one runs, and one has a place";
  EXPECT_EQ(thread_->inbox().generation(), 1);

  const auto newcomer = Offer(Prompt(2, 30));
  ASSERT_TRUE(newcomer->WaitForEnd().has_value());
  EXPECT_EQ(newcomer->tokens(), Expected(2, 30));
  EXPECT_EQ(next.executor.rows(), 4 + 29);
  LoadSnapshot load = thread_->load();
  for (int i = 0; i < 20'000 && load.stats.running != 1; ++i) {  // told after the step
    std::this_thread::sleep_for(milliseconds(1));
    load = thread_->load();
  }
  EXPECT_EQ(load.stats.running, 1);
  EXPECT_EQ(load.stats.pages_total, 4096);
  EXPECT_EQ(load.stats.pages_free + load.stats.pages_used + load.stats.pages_cached, 4096);
  thread_->inbox().Cancel(1);
  ASSERT_TRUE(PagesComeBack());
  EXPECT_FALSE(left) << "a place is still held";

  auto late = std::make_shared<Reader>();
  late->stream = std::make_shared<TokenStream>(3, TokenStream::kUnbounded, late);
  ASSERT_TRUE((*std::move(place)).Submit({Prompt(3, 10), late->stream}));
  ASSERT_TRUE(late->WaitForEnd().has_value());
  EXPECT_EQ(late->tokens(), Expected(3, 10));
  EXPECT_EQ(next.executor.rows(), 4 + 29);
  for (int i = 0; i < 20'000 && !left; ++i) std::this_thread::sleep_for(milliseconds(1));
  EXPECT_TRUE(left);
  const int64_t before = paced_->executor.rows();
  EXPECT_EQ(Offer(Prompt(4, 10))->WaitForEnd()->reason, FinishReason::kLength);
  EXPECT_EQ(paced_->executor.rows(), before);
  EXPECT_TRUE(thread_->Drain(seconds(10)));
}

TEST_F(EngineThreadTest, WhatIsToBeDoneSoonIsNotWaitedFor) {
  Start();
  paced_->executor.Hold();
  const auto running = Offer(Prompt(1, 3));
  paced_->executor.WaitForHeldStep();
  std::atomic<bool> done = false;
  thread_->SoonBetweenSteps([&] { done = true; });  // returns, though the step does not
  EXPECT_FALSE(done);
  paced_->executor.Go();
  EXPECT_TRUE(thread_->BetweenSteps([] {}));
  EXPECT_TRUE(done) << "in the order they came";
  ASSERT_TRUE(running->WaitForEnd().has_value());
  ASSERT_TRUE(thread_->Drain(seconds(10)));
  thread_->SoonBetweenSteps([] { FAIL(); });
  EXPECT_FALSE(thread_->BetweenSteps([] { FAIL(); }));
}

TEST_F(EngineThreadTest, PlaceThatIsGivenBackLetsAnEngineGo) {
  Start();
  PacedEngine next;
  std::atomic<bool> left = false;
  {
    const absl::StatusOr<Reservation> place = thread_->inbox().Reserve(0);
    ASSERT_TRUE(thread_->Replace({.engine = &next.engine}, [&] { left = true; }));
    std::this_thread::sleep_for(milliseconds(20));
    EXPECT_FALSE(left);
  }
  for (int i = 0; i < 20'000 && !left; ++i) std::this_thread::sleep_for(milliseconds(1));
  EXPECT_TRUE(left);
  ASSERT_TRUE(thread_->Drain(seconds(10)));
  EXPECT_FALSE(thread_->Replace({.engine = &paced_->engine}, [] { FAIL(); }));
}

// Two pools have the pages of one: what does not fit beside the old waits, and is not refused.
TEST_F(EngineThreadTest, NewcomersWaitForPagesOfTheReplacedEngine) {
  const SchedulerOptions options{.max_waiting = 1 << 20};
  const KvGeometry geometry{.layers = 2, .pages = 40, .context = 4096};  // 320 tokens
  Start(256, options, geometry);
  paced_->executor.set_step_time(milliseconds(1));
  PacedEngine next(options, geometry);
  const auto running = Offer(Prompt(1, 250));
  ASSERT_TRUE(running->WaitForTokens(5));
  ASSERT_TRUE(thread_->Replace({.engine = &next.engine}, [] {}));
  const auto large = Offer(Prompt(2, 250)), cancelled = Offer(Prompt(3, 200));
  Request late = Prompt(4, 200);
  late.deadline = SteadyNow() + milliseconds(20);
  const auto expiring = Offer(std::move(late));
  const auto small = Offer(Prompt(5, 20));
  ASSERT_TRUE(small->WaitForEnd().has_value());
  EXPECT_EQ(small->tokens(), Expected(5, 20));
  EXPECT_EQ(expiring->WaitForEnd()->reason, FinishReason::kDeadline);
  for (int i = 0; i < 20'000 && thread_->load().stats.waiting != 2; ++i) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(thread_->load().stats.waiting, 2);
  EXPECT_TRUE(large->tokens().empty());
  thread_->inbox().Cancel(3);
  ASSERT_TRUE(running->WaitForEnd().has_value());
  EXPECT_EQ(running->tokens(), Expected(1, 250));
  ASSERT_TRUE(large->WaitForEnd().has_value());
  EXPECT_EQ(large->tokens(), Expected(2, 250));
  EXPECT_TRUE(cancelled->tokens().empty());
  EXPECT_TRUE(PagesComeBack());
  {
    std::lock_guard lock(mutex_);
    for (const Step& step : steps_) {
      EXPECT_LE(step.stats.pages_total, geometry.pages);
      EXPECT_EQ(step.stats.pages_free + step.stats.pages_used + step.stats.pages_cached,
                step.stats.pages_total);
    }
  }
  EXPECT_TRUE(thread_->Drain(seconds(10)));
}

TEST(WatchdogTest, ZeroIsNever) {
  Watchdog never(milliseconds(0)), soon(milliseconds(1));
  EXPECT_FALSE(never.Look(1e9));
  EXPECT_TRUE(soon.Look(1e9));
  EXPECT_TRUE(soon.Look(0));
  EXPECT_FALSE(soon.stuck());
}

// Clients of every temper at once, while the server drains: whoever was accepted gets an end unless
// it cancelled, whoever was not is told so, and all pages are back.
TEST_F(EngineThreadTest, StormOfClientsAcrossADrain) {
  Start(32, {.max_batch_tokens = 64, .max_sequences = 8, .max_waiting = 1 << 20},
        {.layers = 2, .pages = 256, .context = 512});
  std::atomic<int> finished = 0, refused = 0, cancelled = 0, wrong = 0;
  std::vector<std::thread> clients;
  for (int client = 0; client < 6; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(static_cast<unsigned>(client));
      for (int i = 0; i < 60; ++i) {
        const RequestId id = static_cast<RequestId>(client * 1000 + i + 1);
        const int length = 1 + static_cast<int>(random() % 60);
        Request request = Prompt(id, length, 1 + static_cast<int>(random() % 100));
        if (random() % 4 == 0) request.deadline = SteadyNow() + milliseconds(random() % 5);
        const auto reader = Offer(std::move(request));
        if (reader == nullptr) {
          ++refused;
          std::this_thread::yield();
          continue;
        }
        if (random() % 3 == 0) {
          reader->WaitForTokens(random() % 2);
          thread_->inbox().Cancel(id);
          ++cancelled;
          continue;
        }
        if (!reader->WaitForEnd().has_value()) ++wrong;
        const std::vector<int32_t> tokens = reader->tokens();
        if (tokens != Expected(id, static_cast<int>(tokens.size()))) ++wrong;
        ++finished;
      }
    });
  }
  std::this_thread::sleep_for(milliseconds(30));
  EXPECT_TRUE(thread_->Drain(seconds(30)));
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(finished + refused + cancelled, 6 * 60);
  EXPECT_EQ(thread_->load().stats.pages_used, 0);
  paced_->engine.scheduler().CheckInvariants();
}

}  // namespace
}  // namespace espalier
