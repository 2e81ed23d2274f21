#include "server/decision_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "policy/capped_policy.h"

namespace espalier {
namespace {

using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

Ladder Two() {
  Ladder ladder = Ladder::DenseOnly({.layers = 1, .heads = 2, .channels = 64});
  EXPECT_TRUE(
      ladder.Append({ladder.rung(0).prefill, ladder.rung(0).decode, {.quality_loss_nats = 0.1}}));
  return ladder;
}

std::unique_ptr<DecisionLog> Log(const std::string& path = "") {
  absl::StatusOr<std::unique_ptr<DecisionLog>> log = DecisionLog::Create(path, {}, "a network");
  EXPECT_TRUE(log.ok()) << log.status();
  return *std::move(log);
}

int64_t Lines(const std::string& text) { return std::ranges::count(text, '\n'); }

TEST(DecisionLog, TellsThePolicyFirstAndTheLastLinesAsked) {
  const std::unique_ptr<DecisionLog> log = Log();
  const std::string first = log->Recent(9);
  EXPECT_THAT(first, StartsWith(R"({"policy":"dqn","network":"a network","version":3,)"));
  EXPECT_EQ(Lines(first), 1);
  for (int i = 0; i < 3; ++i) log->AddChoice(i, {.allowed = 3, .priority = -i}, 1, 0);
  EXPECT_EQ(log->Recent(2), first +
                                "{\"dropped\":1}\n"
                                R"({"request":1,"allowed":3,"priority":-1,"wanted":1,"rung":0})"
                                "\n"
                                R"({"request":2,"allowed":3,"priority":-2,"wanted":1,"rung":0})"
                                "\n");
  EXPECT_EQ(Lines(log->Recent(3)), 4);
  EXPECT_EQ(log->Recent(3), log->Recent(SIZE_MAX));
}

TEST(DecisionLog, KeepsAThousandReportsAndWhatExplainsThem) {
  const std::unique_ptr<DecisionLog> log = Log();
  const Ladder ladder = Two();
  LadderPolicy rule({.load_loss = 9});
  CappedPolicy capped(&rule);
  LoggedPolicy policy(&capped, log.get());
  capped.set_hardest(0);
  log->AddCap(0);
  for (int i = 0; i < 10'000; ++i) {
    policy.Observe({.time_s = i / 3.0,
                    .kv_used = i / 7.0,
                    .oldest_wait_s = i / 11.0,
                    .step_s = i / 13.0,
                    .arrivals_per_s = i / 17.0},
                   ladder);
  }
  const std::string all = log->Recent(SIZE_MAX);
  EXPECT_GT(Lines(all), 1000);
  EXPECT_LT(Lines(all), 5000) << "and no more than fits";
  EXPECT_THAT(all, HasSubstr("{\"losses\":[0,0.1]}\n{\"cap\":0}\n{\"time_s\":"));
  EXPECT_THAT(all, HasSubstr(R"("hardest":0,"reason":"quality")"));
  EXPECT_THAT(all, EndsWith("}\n"));
  EXPECT_THAT(log->Recent(1), HasSubstr("{\"dropped\":10001}\n{\"losses\":[0,0.1]}\n{\"cap\":0}\n"))
      << "two lines more than reports";
}

TEST(DecisionLog, IsReadWhileItIsWrittenAndItsFileHasAllUntilItIsClosed) {
  const std::string path = testing::TempDir() + "decision_log_test.log";
  const std::unique_ptr<DecisionLog> log = Log(path);
  std::atomic<bool> ended = false;
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      while (!ended.load()) EXPECT_THAT(log->Recent(5), EndsWith("}\n"));
    });
  }
  constexpr int kChoices = 20'000;
  for (int i = 0; i < kChoices; ++i) log->AddChoice(i, {}, 0, 0);
  ended = true;
  for (std::thread& reader : readers) reader.join();
  log->Close();
  log->AddCap(7);
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ(Lines(text), 1 + kChoices);
  EXPECT_THAT(text, Not(HasSubstr("cap")));
  EXPECT_THAT(log->Recent(1), EndsWith("{\"cap\":7}\n"));
}

TEST(DecisionLog, TheOneBeforeIsKept) {
  const std::string path = testing::TempDir() + "decision_log_test_twice.log";
  std::remove(path.c_str());
  for (const int cap : {1, 2, 3}) Log(path)->AddCap(cap);
  const auto read = [](const std::string& name) {
    std::ifstream file(name);
    return std::string((std::istreambuf_iterator<char>(file)), {});
  };
  EXPECT_THAT(read(path), EndsWith("{\"cap\":3}\n"));
  EXPECT_THAT(read(path + ".old"), EndsWith("{\"cap\":2}\n"));
}

}  // namespace
}  // namespace espalier
