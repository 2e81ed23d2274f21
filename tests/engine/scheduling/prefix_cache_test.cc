#include "engine/scheduling/prefix_cache.h"

#include <map>
#include <random>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/allocations.h"

namespace espalier {
namespace {

using testing::ElementsAre;

constexpr uint64_t kKey = 0;
constexpr int32_t kNone = PrefixCache::kNone;

// A pool of two layers, of which the second keeps K and V at key 0 only, and pages of two tokens.
class PrefixCacheTest : public testing::Test {
 protected:
  static constexpr int kPages = 64, kLayers = 2;

  // Adds a node with one user. Its pages are taken from the pool.
  int32_t Add(uint64_t key, int32_t parent, std::vector<int32_t> tokens) {
    for (int layer = 0; layer < kLayers; ++layer) {
      tables_[layer].clear();
      if (layer == 0 || key == kKey) tables_[layer].push_back(pool_.Take(layer));
    }
    return cache_.Insert(key, parent, tokens, tables_, 0);
  }

  int32_t Find(uint64_t key, int32_t parent, std::vector<int32_t> tokens) const {
    return cache_.Find(key, parent, tokens);
  }

  void Check(const std::map<int32_t, int>& users) const {
    std::vector<int> counted(cache_.capacity(), 0);
    for (const auto& [node, count] : users) counted[node] = count;
    std::vector<bool> seen(kPages, false);
    std::vector<int> used(kLayers, 0);
    cache_.CheckInvariants(counted, &seen, &used);
    pool_.CheckInvariants();
    for (int layer = 0; layer < kLayers; ++layer) EXPECT_EQ(used[layer], pool_.used_by(layer));
  }

  std::vector<std::vector<int32_t>> tables_{kLayers};
  PagePool pool_{kPages, kLayers};
  PrefixCache cache_{kPages, kLayers, /*page_tokens=*/2, &pool_};
};

TEST_F(PrefixCacheTest, ANodeIsKnownByKeyParentAndTokens) {
  const int32_t first = Add(0, kNone, {1, 2});
  const int32_t second = Add(0, first, {1, 2});
  const int32_t other = Add(7, kNone, {1, 2});
  EXPECT_EQ(Find(0, kNone, {1, 2}), first);
  EXPECT_EQ(Find(0, first, {1, 2}), second);
  EXPECT_EQ(Find(7, kNone, {1, 2}), other);
  EXPECT_EQ(Find(0, second, {1, 2}), kNone);
  EXPECT_EQ(Find(0, kNone, {2, 1}), kNone);
  EXPECT_EQ(Find(8, kNone, {1, 2}), kNone);
  EXPECT_THAT(cache_.pages(other), ElementsAre(4, -1));
  Check({{first, 1}, {second, 1}, {other, 1}});
}

// With as many nodes as fit, many share a bucket with others; none is taken for another.
TEST_F(PrefixCacheTest, NodesOfOneBucketAreToldApart) {
  std::vector<int32_t> nodes;
  std::map<int32_t, int> users;
  for (int32_t i = 0; i < kPages; ++i) {
    ASSERT_EQ(Find(9, kNone, {i, i}), kNone);
    nodes.push_back(Add(9, kNone, {i, i}));
    users[nodes.back()] = 1;
  }
  Check(users);
  for (int32_t i = 0; i < kPages; ++i) {
    EXPECT_EQ(Find(9, kNone, {i, i}), nodes[i]);
    for (int32_t j = 0; j < 40; ++j) EXPECT_EQ(Find(9, kNone, {i, kPages + j}), kNone);
  }
}

TEST_F(PrefixCacheTest, PagesAreCachedWhenTheLastUserGoesAndFreeWhenEvicted) {
  const int32_t parent = Add(0, kNone, {1, 2});
  const int32_t child = Add(0, parent, {3, 4});
  cache_.Use(parent);
  EXPECT_FALSE(cache_.Evict()) << "both have users";
  cache_.Release(child);
  cache_.Release(parent);
  EXPECT_EQ(pool_.cached(), 2);
  Check({{parent, 1}});
  cache_.Release(parent);
  EXPECT_EQ(pool_.cached(), 4);
  EXPECT_EQ(pool_.used(), 0);

  cache_.Use(parent);
  cache_.Use(child);
  EXPECT_EQ(pool_.used(), 4);
  Check({{parent, 1}, {child, 1}});
  cache_.Release(child);
  cache_.Release(parent);
  EXPECT_TRUE(cache_.Evict());
  EXPECT_EQ(Find(0, parent, {3, 4}), kNone);
  EXPECT_EQ(Find(0, kNone, {1, 2}), parent);
  Check({});
  EXPECT_TRUE(cache_.Evict());
  EXPECT_FALSE(cache_.Evict());
  EXPECT_EQ(pool_.free(), kPages);
  EXPECT_EQ(cache_.evicted_pages(), 4u);
  Check({});
}

// Random trees: chains branch and grow, are used, released and evicted.
TEST_F(PrefixCacheTest, LeavesGoBeforeWhatTheyStandOnAndNothingIsAllocated) {
  std::mt19937_64 random(5);
  std::vector<std::vector<int32_t>> chains;
  std::map<int32_t, int> users;
  for (std::vector<int32_t>& table : tables_) table.reserve(1);
  for (int turn = 0; turn < 3000; ++turn) {
    if (random() % 3 == 0 && !chains.empty()) {
      std::swap(chains[random() % chains.size()], chains.back());
      for (; !chains.back().empty(); chains.back().pop_back()) {
        cache_.Release(chains.back().back());
        --users[chains.back().back()];
      }
      chains.pop_back();
    } else if (chains.size() < 8) {
      std::vector<int32_t>& chain = chains.emplace_back();
      for (uint64_t depth = random() % 8; depth > 0; --depth) {
        const int32_t parent = chain.empty() ? kNone : chain.back();
        const std::vector<int32_t> tokens = {int32_t(random() % 3), 1};
        const int64_t before = Allocations();
        int32_t node = cache_.Find(kKey, parent, tokens);
        if (node != kNone) {
          cache_.Use(node);
        } else {
          while (pool_.free() < kLayers && cache_.Evict()) continue;
          if (pool_.free() < kLayers) break;
          for (int layer = 0; layer < kLayers; ++layer) tables_[layer].assign(1, pool_.Take(layer));
          node = cache_.Insert(kKey, parent, tokens, tables_, 0);
        }
        ASSERT_EQ(Allocations(), before);
        chain.push_back(node);
        ++users[node];
      }
    }
    Check(users);
  }
  EXPECT_GT(cache_.evicted_pages(), 1000u);
}

TEST_F(PrefixCacheTest, CrashesOnAReleaseTooMany) {
  const int32_t node = Add(0, kNone, {1, 2});
  cache_.Release(node);
  EXPECT_DEATH(cache_.Release(node), "has no user");
}

}  // namespace
}  // namespace espalier
