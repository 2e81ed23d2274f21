// A decision of the learned policy, in its shield, allocates nothing, nor does its log.
#include <cstdint>
#include <random>
#include <string>

#include "gtest/gtest.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "server/decision_log.h"
#include "tests/support/allocations.h"

namespace espalier {
namespace {

TEST(Decision, AllocatesNothing) {
  const SiteWidths widths{.layers = 4, .heads = 2, .channels = 64};
  Ladder ladder = Ladder::DenseOnly(widths, {.kv_bytes_per_token = 8});
  KeepProfile keep = KeepProfile::Dense(widths);
  keep.Keep(0, SiteKind::kHeads, 0);
  ASSERT_TRUE(ladder.Append({keep, keep, {.kv_bytes_per_token = 6, .quality_loss_nats = 0.1}}));
  std::mt19937_64 random(3);
  const QNetwork network({.inputs = kLevelInputs, .hidden = 48, .actions = 2}, &random);
  DqnPolicy learned({}, &network);
  Shield shield(&learned, {});
  const std::string path = testing::TempDir() + "decision_allocation_test.log";
  const auto log = DecisionLog::Create(path, {});
  ASSERT_TRUE(log.ok()) << log.status();
  LoggedPolicy policy(&shield, log->get());
  const int64_t before = Allocations();
  int decided = 0;
  for (int i = 0; i < 1000; ++i) {
    policy.Observe({.time_s = 0.6 * i, .kv_used = i % 7 * 0.2, .oldest_wait_s = i % 5 * 0.3},
                   ladder);
    const int rung = policy.ChooseRung({.allowed = 3});
    policy.Chose(static_cast<uint64_t>(i), {.allowed = 3}, rung);
    decided += rung;
  }
  EXPECT_EQ(Allocations(), before);
  EXPECT_GT(decided, 0);
}

}  // namespace
}  // namespace espalier
