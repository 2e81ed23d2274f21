#include "server/memory_keeper.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class MemoryKeeperTest : public ::testing::Test {
 protected:
  // 100 pages of 10 bytes beside 1000 bytes of other things.
  MemoryKeeper Make(uint64_t budget) {
    return {{.budget = budget, .page_bytes = 10, .pages = 100, .other_bytes = 1000},
            [this](int pages) { told_.push_back(pages); },
            {.machine = [this] { return machine_; }, .resident = [this] { return resident_; }}};
  }

  MachineMemory machine_{.total = 32'000, .available = 20'000};
  uint64_t resident_ = 1000;
  std::vector<int> told_;
};

TEST_F(MemoryKeeperTest, SaysNothingWhileThereIsEnough) {
  MemoryKeeper keeper = Make(0);
  keeper.Look();
  keeper.SetBudget(2000);
  EXPECT_THAT(told_, IsEmpty());
  EXPECT_EQ(keeper.pages(), 100);
  EXPECT_EQ(keeper.budget(), 2000);
}

TEST_F(MemoryKeeperTest, ABudgetIsWhatIsNoKvAndPages) {
  MemoryKeeper keeper = Make(1500);
  keeper.Look();
  keeper.Look();
  keeper.SetBudget(1509);
  keeper.SetBudget(1510);
  keeper.SetBudget(900);
  keeper.SetBudget(0);
  EXPECT_THAT(told_, ElementsAre(50, 51, 0, 100));
}

TEST_F(MemoryKeeperTest, FollowsWhatOthersLeave) {
  MemoryKeeper keeper = Make(0);
  machine_.available = 1000 + 300;  // of which 1000 are left to others
  keeper.Look();
  machine_.available = 1000 + 340;
  keeper.Look();  // not worth it
  machine_.available = 1000 + 350;
  keeper.Look();
  machine_.available = 10;
  keeper.Look();
  machine_.available = 20'000;
  keeper.Look();
  EXPECT_THAT(told_, ElementsAre(30, 35, 0, 100));
}

TEST_F(MemoryKeeperTest, CountsWhatTheProcessHasGrownBy) {
  MemoryKeeper keeper = Make(2000);
  resident_ = 2200;  // 1000 and 100 full pages are 2000
  keeper.Look();
  EXPECT_THAT(told_, ElementsAre(80));
}

TEST_F(MemoryKeeperTest, AMachineThatSaysNothingTakesNothing) {
  machine_ = {};
  MemoryKeeper keeper = Make(0);
  keeper.Look();
  EXPECT_THAT(told_, IsEmpty());
  keeper.SetBudget(1200);
  EXPECT_THAT(told_, ElementsAre(20));
}

}  // namespace
}  // namespace espalier
