#include "policy/capped_policy.h"

#include <gtest/gtest.h>

namespace espalier {
namespace {

TEST(CappedPolicy, ServesNoHarderThanItsCap) {
  FixedPolicy inner(3);
  CappedPolicy policy(&inner);
  constexpr RungSet kAll = ~RungSet{0};
  EXPECT_EQ(policy.ChooseRung({.allowed = kAll}), 3);
  EXPECT_EQ(policy.wanted(), 3);
  EXPECT_EQ(policy.hardest_served(), 3) << "the fixed one's";
  EXPECT_EQ(ShadowPolicy(&policy).hardest_served(), 0);
  EXPECT_EQ(policy.reason(), inner.reason());
  policy.set_hardest(1);
  EXPECT_EQ(policy.ChooseRung({.allowed = kAll}), 1);
  EXPECT_EQ(policy.ChooseRung({.allowed = 0b1001}), 0) << "one that the bounds allow";
  EXPECT_EQ(policy.wanted(), 1);
  EXPECT_EQ(policy.reason(), "quality");
  policy.set_hardest(0);
  EXPECT_EQ(policy.ChooseRung({.allowed = kAll}), 0);
  EXPECT_EQ(policy.hardest_open(), 0);
  EXPECT_EQ(policy.hardest_served(), 0);
  policy.set_hardest(kMostRungs);
  EXPECT_EQ(policy.ChooseRung({.allowed = kAll}), 3);
}

}  // namespace
}  // namespace espalier
