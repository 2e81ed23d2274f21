#include "policy/training/double_dqn.h"

#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

// Four places in a row; action 1 goes right, 0 ends with 1 at once. The last place pays 5.
constexpr int kPlaces = 4;

std::vector<float> At(int place) {
  std::vector<float> state(kPlaces);
  state[place] = 1;
  return state;
}

TEST(DoubleDqn, LearnsToWaitForWhatPaysMore) {
  DoubleDqn dqn({.inputs = kPlaces, .hidden = 16, .actions = 2},
                {.gamma = 0.9F, .learning_rate = 3e-3F, .batch = 32, .target_every = 50});
  const std::vector<uint8_t> both = {1, 1};
  for (int episode = 0; episode < 600; ++episode) {
    for (int place = static_cast<int>(dqn.random()() % kPlaces); place < kPlaces;) {
      const int action =
          dqn.Explores(0.5) ? static_cast<int>(dqn.random()() % 2) : dqn.Choose(At(place), both);
      Transition step{.state = At(place), .action = action};
      const bool last = action == 0 || place + 1 == kPlaces;
      step.reward = action == 0 ? 1.0F : place + 1 == kPlaces ? 5.0F : 0.0F;
      if (!last) {
        step.next_state = At(place + 1);
        step.next_allowed = both;
      }
      dqn.Remember(std::move(step));
      dqn.Learn();
      dqn.Learn();
      if (last) break;
      ++place;
    }
  }
  std::vector<float> hidden(16), values(2);
  float expected = 5;
  for (int place = kPlaces - 1; place >= 0; --place, expected *= 0.9F) {
    dqn.network().Values(At(place), hidden, values);
    EXPECT_NEAR(values[1], expected, 0.3) << place;
    EXPECT_NEAR(values[0], 1, 0.3) << place;
  }
}

TEST(DoubleDqn, NeverTakesWhatIsNotAllowed) {
  DoubleDqn dqn({.inputs = 1, .hidden = 4, .actions = 3}, {.batch = 8});
  // Action 2 would be worth 100 later, but is not allowed there; the best of the others is 1.
  for (int i = 0; i < 400; ++i) {
    dqn.Remember({.state = {1}, .action = 0, .next_state = {-1}, .next_allowed = {1, 1, 0}});
    dqn.Remember({.state = {-1}, .action = i % 3, .reward = i % 3 == 2 ? 100.0F : 1.0F});
    for (int learn = 0; learn < 8; ++learn) dqn.Learn();
  }
  EXPECT_NE(dqn.Choose(std::vector<float>{-1}, std::vector<uint8_t>{1, 1, 0}), 2);
  std::vector<float> hidden(4), values(3);
  dqn.network().Values(std::vector<float>{1}, hidden, values);
  EXPECT_LT(values[0], 5);
}

TEST(DoubleDqn, LearnsNothingBeforeABatchIsThere) {
  DoubleDqn dqn({.inputs = 1, .hidden = 4, .actions = 2}, {.batch = 4});
  const std::vector<float> before(dqn.network().parameters().begin(),
                                  dqn.network().parameters().end());
  for (int i = 0; i < 3; ++i) dqn.Remember({.state = {1}, .reward = 1});
  EXPECT_EQ(dqn.Learn(), 0);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), dqn.network().parameters().begin()));
  dqn.Remember({.state = {1}, .reward = 1});
  EXPECT_GT(dqn.Learn(), 0);
}

TEST(DoubleDqn, ForgetsTheOldest) {
  DoubleDqn dqn({.inputs = 1, .hidden = 8, .actions = 1}, {.batch = 8, .replay = 8});
  for (int i = 0; i < 100; ++i) dqn.Remember({.state = {1}, .reward = i < 92 ? -9.0F : 2.0F});
  for (int i = 0; i < 2000; ++i) dqn.Learn();
  std::vector<float> hidden(8), values(1);
  dqn.network().Values(std::vector<float>{1}, hidden, values);
  EXPECT_NEAR(values[0], 2, 0.01);
}

}  // namespace
}  // namespace espalier
