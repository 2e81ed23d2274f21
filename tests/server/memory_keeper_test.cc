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
  uint64_t released_ = 0;
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

TEST_F(MemoryKeeperTest, TellsSharesOfWhatItMayHoldAndOfWhatOthersHold) {
  MemoryKeeper keeper = Make(4000);
  std::optional<MemoryKeeper::Shares> seen = keeper.Look();
  ASSERT_TRUE(seen.has_value());
  EXPECT_DOUBLE_EQ(seen->free, 0.75) << "3000 of 4000";
  EXPECT_DOUBLE_EQ(seen->foreign, 11'000 / 32'000.0) << "neither available nor its own";
  machine_.available = 1500;  // of which 1000 are left to others
  seen = keeper.Look();
  EXPECT_DOUBLE_EQ(seen->free, 500 / 1500.0) << "less than the budget";
  resident_ = 9000;
  EXPECT_EQ(keeper.Look()->free, 0);
  machine_.total = 0;
  EXPECT_EQ(keeper.Look(), std::nullopt);
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

TEST_F(MemoryKeeperTest, AShareFollowsWhatThereIsUntilABudgetIsSet) {
  MemoryKeeper keeper(
      {.share = 0.25, .page_bytes = 10, .pages = 100, .other_bytes = 1000},
      [this](int pages) { told_.push_back(pages); },
      {.machine = [this] { return machine_; }, .resident = [this] { return resident_; }});
  machine_ = {.total = 6000, .available = 5000};
  keeper.Look();
  EXPECT_EQ(keeper.budget(), 1500);
  machine_.total = 4800;  // a container's limit, lowered
  keeper.Look();
  EXPECT_EQ(keeper.budget(), 1200);
  keeper.SetBudget(1600);
  keeper.Look();
  EXPECT_EQ(keeper.budget(), 1600);
  keeper.SetBudget(0, 0.5);
  EXPECT_EQ(keeper.budget(), 2400);
  EXPECT_THAT(told_, ElementsAre(50, 20, 60, 100));
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

TEST_F(MemoryKeeperTest, LeavesMoreWhileTasksWaitForMemory) {
  MemoryKeeper keeper = Make(0);
  machine_.available = 4000 + 500;  // half of the pages, if 4000 were left in place of 1000
  machine_.stalled = 0.09;
  EXPECT_TRUE(keeper.Look());
  machine_.stalled = 0.1;
  keeper.Look();
  machine_.stalled = 0.02;
  keeper.Look();
  machine_.stalled = 0.019;
  keeper.Look();
  machine_.stalled = std::nullopt;
  keeper.Look();
  EXPECT_THAT(told_, ElementsAre(50, 100));
}

TEST_F(MemoryKeeperTest, TellsWhatWeightsHaveToLeaveFor) {
  MemoryKeeper keeper{{.page_bytes = 10, .pages = 100, .other_bytes = 1000, .weight_pages = 40},
                      [this](int pages) { told_.push_back(pages); },
                      {.machine = [this] { return machine_; },
                       .resident = [this] { return resident_; },
                       .released = [this] { return released_; }}};
  keeper.SetBudget(895);
  EXPECT_EQ(keeper.kv_bytes(), 0u);
  // 300 of the weights have left, and 19 pages are in use: as if 1190 were held.
  released_ = 300, resident_ = 890;
  keeper.Look();
  EXPECT_EQ(keeper.kv_bytes(), 190u) << "and no more pages than before";
  keeper.SetBudget(100);
  EXPECT_EQ(keeper.kv_bytes(), 0u);
  keeper.SetBudget(0);
  EXPECT_THAT(told_, ElementsAre(-11, -40, 100));
  // Another model, of whose weights 600 may leave; and one that keeps all.
  keeper.SetBudget(100);
  keeper.SetOther(1000, 60);
  keeper.SetOther(1000, 0);
  EXPECT_THAT(told_, ElementsAre(-11, -40, 100, -40, -60, 0));
}

TEST_F(MemoryKeeperTest, TellsTheRoomThatThereIs) {
  MemoryKeeper keeper = Make(0);
  EXPECT_EQ(keeper.Room(1200), 19'000u) << "1000 are left to others";
  machine_.stalled = 0.2;
  keeper.Look();
  EXPECT_EQ(keeper.Room(1200), 16'000u);
  keeper.SetBudget(2000);
  EXPECT_EQ(keeper.Room(1200), 800u);
  EXPECT_EQ(keeper.Room(2200), 0u);
  machine_.available = 3000;
  EXPECT_EQ(keeper.Room(1200), 0u);
  machine_ = {};
  EXPECT_EQ(keeper.Room(1200), 800u) << "by the budget alone";
}

TEST_F(MemoryKeeperTest, CountsWhatTheProcessHasGrownBy) {
  MemoryKeeper keeper = Make(2000);
  resident_ = 2200;  // 1000 and 100 full pages are 2000
  keeper.Look();
  EXPECT_THAT(told_, ElementsAre(80));
}

TEST_F(MemoryKeeperTest, PagesInUseBeyondTheLimitAreNoOtherMemory) {
  int kv_pages = 60;
  MemoryKeeper keeper{{.page_bytes = 10, .pages = 100, .other_bytes = 1000},
                      [this](int pages) { told_.push_back(pages); },
                      {.machine = [this] { return machine_; },
                       .resident = [&] { return 1000 + 10 * uint64_t(kv_pages); },
                       .kv_pages = [&] { return kv_pages; }}};
  keeper.SetBudget(1400);
  for (; kv_pages < 90; kv_pages += 10) keeper.Look();  // it grows on
  EXPECT_THAT(told_, ElementsAre(40));
}

TEST_F(MemoryKeeperTest, AMachineThatSaysNothingTakesNothing) {
  machine_ = {};
  MemoryKeeper keeper = Make(0);
  EXPECT_FALSE(keeper.Look());
  EXPECT_THAT(told_, IsEmpty());
  keeper.SetBudget(1200);
  EXPECT_THAT(told_, ElementsAre(20));
}

}  // namespace
}  // namespace espalier
