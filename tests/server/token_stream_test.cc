#include "server/token_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "server/ready_queue.h"
#include "server/serial_gate.h"

namespace espalier {
namespace {

SequenceOutput Tokens(std::vector<int32_t> ids) {
  SequenceOutput output{.id = 1};
  for (int32_t id : ids) output.tokens.push_back({.token = id});
  return output;
}

std::vector<int32_t> Ids(const TokenStream::Pending& pending) {
  std::vector<int32_t> ids;
  for (const TokenResult& token : pending.tokens) ids.push_back(token.token);
  return ids;
}

TEST(TokenStream, DrainTakesEverythingThatWaits) {
  TokenStream stream(1, 10, {});
  EXPECT_TRUE(stream.Push(Tokens({1, 2}), Instant(100)));
  EXPECT_TRUE(stream.Push(Tokens({3}), Instant(200)));
  TokenStream::Pending pending;
  stream.Drain(&pending);
  EXPECT_THAT(Ids(pending), testing::ElementsAre(1, 2, 3));
  EXPECT_FALSE(pending.end.has_value());
  EXPECT_EQ(pending.progress.first_token, Instant(100));
  EXPECT_EQ(pending.progress.last_token, Instant(200));
  stream.End({.reason = FinishReason::kLength});
  stream.Drain(&pending);
  EXPECT_TRUE(pending.tokens.empty());
  ASSERT_TRUE(pending.end.has_value());
  EXPECT_EQ(pending.end->reason, FinishReason::kLength);
  stream.Drain(&pending);
  EXPECT_FALSE(pending.end.has_value()) << "the end is told once";
}

TEST(TokenStream, RefusesWhatDoesNotFitAndKeepsWhatDid) {
  TokenStream stream(1, 3, {});
  EXPECT_TRUE(stream.Push(Tokens({1, 2, 3}), Instant(1)));
  EXPECT_FALSE(stream.Push(Tokens({4}), Instant(2)));
  EXPECT_FALSE(stream.stalled());
  stream.End({.cause = StreamEnd::Cause::kStalled});
  EXPECT_TRUE(stream.stalled());
  TokenStream::Pending pending;
  stream.Drain(&pending);
  EXPECT_THAT(Ids(pending), testing::ElementsAre(1, 2, 3));
  EXPECT_EQ(pending.end->cause, StreamEnd::Cause::kStalled);
}

// A write loop as a call has it: whoever enters the gate drains until there is nothing more.
class GatedReader final : public StreamReader {
 public:
  void OnReady() override {
    if (!gate_.Enter()) return;
    do {
      EXPECT_EQ(inside_.fetch_add(1), 0) << "two threads inside";
      stream->Drain(&pending_);
      for (const TokenResult& token : pending_.tokens) {
        if (token.token != next_++) ++disorder;
      }
      if (pending_.end.has_value()) ended = true;
      inside_.fetch_sub(1);
    } while (!gate_.Leave());
  }

  std::shared_ptr<TokenStream> stream;
  std::atomic<int> disorder = 0;
  std::atomic<bool> ended = false;

 private:
  SerialGate gate_;
  std::atomic<int> inside_ = 0;
  int next_ = 0;
  TokenStream::Pending pending_;
};

// One engine, three writers: every token arrives once, in order, and the end is never lost.
TEST(ReadyQueue, NoTokenIsLostOrReorderedByThreeWriters) {
  constexpr int kStreams = 16, kTokens = 2000;
  std::vector<std::shared_ptr<GatedReader>> readers;
  for (int i = 0; i < kStreams; ++i) {
    readers.push_back(std::make_shared<GatedReader>());
    readers[i]->stream =
        std::make_shared<TokenStream>(RequestId(i), TokenStream::kUnbounded, readers[i]);
  }
  {
    ReadyQueue ready(3);
    std::vector<std::shared_ptr<TokenStream>> posts;
    for (int token = 0; token < kTokens; ++token) {
      for (const auto& reader : readers) {
        ASSERT_TRUE(reader->stream->Push(Tokens({token}), Instant(token)));
        if (token == kTokens - 1) reader->stream->End({});
        posts.push_back(reader->stream);
      }
      ready.Post(&posts);
      EXPECT_TRUE(posts.empty());
    }
  }
  for (const auto& reader : readers) {
    EXPECT_EQ(reader->disorder, 0);
    EXPECT_TRUE(reader->ended);
  }
}

TEST(ReadyQueue, ReaderThatWentAwayIsNotCalled) {
  auto reader = std::make_shared<GatedReader>();
  auto stream = std::make_shared<TokenStream>(1, 10, reader);
  reader.reset();
  ReadyQueue ready(1);
  std::vector<std::shared_ptr<TokenStream>> posts = {stream, stream};
  ready.Post(&posts);
}

TEST(SerialGate, KnockMakesTheOneInsideGoRoundAgain) {
  SerialGate gate;
  EXPECT_TRUE(gate.Enter());
  EXPECT_FALSE(gate.Enter());
  EXPECT_FALSE(gate.Enter());
  EXPECT_FALSE(gate.Leave()) << "two knocks are answered by one round";
  EXPECT_TRUE(gate.Leave());
  EXPECT_TRUE(gate.Enter());
}

// Work that is handed over just when the holder leaves is never left lying.
TEST(SerialGate, NoWorkIsLeftLying) {
  SerialGate gate;
  std::atomic<int> offered = 0;
  int done = 0;  // only inside the gate
  const auto work = [&] {
    for (int i = 0; i < 20000; ++i) {
      ++offered;
      if (!gate.Enter()) continue;
      do {
        done += offered.exchange(0);
      } while (!gate.Leave());
    }
  };
  std::thread other(work);
  work();
  other.join();
  EXPECT_EQ(done, 40000);
  EXPECT_EQ(offered, 0);
}

}  // namespace
}  // namespace espalier
