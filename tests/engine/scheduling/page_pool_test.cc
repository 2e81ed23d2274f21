#include "engine/scheduling/page_pool.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

TEST(PagePool, GivesFreshPagesInOrderAndTheLastReturnedFirst) {
  PagePool pool(4, 2);
  EXPECT_EQ(pool.Take(0), 0);
  EXPECT_EQ(pool.Take(1), 1);
  EXPECT_EQ(pool.Take(1), 2);
  pool.Return(0, std::vector<int32_t>{0});
  EXPECT_EQ(pool.Take(1), 0);
  EXPECT_EQ(pool.Take(0), 3);
  EXPECT_EQ(pool.Take(0), -1);
  pool.CheckInvariants();
}

TEST(PagePool, CountsByLayer) {
  PagePool pool(5, 3);
  const std::vector<int32_t> pages = {pool.Take(2), pool.Take(2)};
  pool.Take(0);
  EXPECT_EQ(pool.used_by(0), 1);
  EXPECT_EQ(pool.used_by(1), 0);
  EXPECT_EQ(pool.used_by(2), 2);
  EXPECT_EQ(pool.layer_of(pages[1]), 2);
  pool.Return(2, pages);
  EXPECT_EQ(pool.used_by(2), 0);
  EXPECT_EQ(pool.layer_of(pages[1]), -1);
  EXPECT_EQ(pool.free() + pool.used() + pool.cached(), pool.total());
  EXPECT_EQ(pool.used(), 1);
  pool.CheckInvariants();
}

TEST(PagePool, ShrinksWhenItsEndIsEmptyAndGrowsAgain) {
  PagePool pool(6, 2);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(pool.Take(i % 2), i);
  pool.Cache(4);
  EXPECT_DEATH(pool.SetLimit(4), "page 4 is out, and 4 may be");
  EXPECT_DEATH(pool.Empty(4), "no page below 4 is free for page 4");
  pool.Return(1, std::vector<int32_t>{1});
  pool.Return(0, std::vector<int32_t>{2});
  using Move = std::pair<int32_t, int32_t>;
  const std::vector<Move> moves = pool.Empty(3);
  EXPECT_THAT(moves, testing::UnorderedElementsAre(Move(3, 1), Move(4, 2)));
  EXPECT_EQ(pool.layer_of(1), 1);
  EXPECT_TRUE(pool.cached(2));
  EXPECT_FALSE(pool.cached(4));
  pool.CheckInvariants();
  pool.SetLimit(3);
  pool.CheckInvariants();
  EXPECT_EQ(pool.total(), 3);
  EXPECT_EQ(pool.Take(0), -1);
  pool.SetLimit(6);
  EXPECT_EQ(pool.Take(0), 3);
  EXPECT_EQ(pool.used() + pool.cached() + pool.free(), 6);
  pool.CheckInvariants();
}

TEST(PagePool, ACachedPageIsNeitherUsedNorFree) {
  PagePool pool(3, 2);
  const int32_t page = pool.Take(1), other = pool.Take(0);
  pool.Cache(page);
  EXPECT_TRUE(pool.cached(page));
  EXPECT_EQ(pool.cached(), 1);
  EXPECT_EQ(pool.used(), 1);
  EXPECT_EQ(pool.used_by(1), 0);
  EXPECT_EQ(pool.free(), 1);
  EXPECT_EQ(pool.available(), 2);
  EXPECT_EQ(pool.layer_of(page), 1);
  pool.CheckInvariants();
  pool.Reuse(page);
  EXPECT_EQ(pool.used_by(1), 1);
  pool.Cache(other);
  pool.Return(0, std::vector<int32_t>{other});
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(pool.free(), 2);
  pool.CheckInvariants();
}

TEST(PagePool, AnEmptyPoolHasNothingToGive) {
  PagePool pool(0, 1);
  EXPECT_EQ(pool.Take(0), -1);
  pool.CheckInvariants();
}

TEST(PagePoolDeathTest, CrashesOnPagesThatAreNotOut) {
  PagePool pool(4, 2);
  const int32_t page = pool.Take(1);
  EXPECT_DEATH(pool.Return(0, std::vector<int32_t>{page}), "page 0 returned by layer 0, held by 1");
  EXPECT_DEATH(pool.Return(1, std::vector<int32_t>{page, page}), "held by -1");
  EXPECT_DEATH(pool.Return(1, std::vector<int32_t>{4}), "page 4 returned, the pool has 4");
  EXPECT_DEATH(pool.Reuse(page), "page 0 reused, but not cached");
  EXPECT_DEATH(pool.Cache(1), "page 1 cached, but not in use");
  EXPECT_DEATH(PagePool(1, 0), "1 pages for 0 layers");
}

}  // namespace
}  // namespace espalier
