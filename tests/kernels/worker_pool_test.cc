// Fork and join: every index once, nothing lost or seen early, no CPU while idle. Links neither
// gRPC nor kernels, so that a thread sanitizer may judge it.
#include "kernels/cpu/worker_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace espalier {
namespace {

class WorkerPoolTest : public ::testing::TestWithParam<int> {};

INSTANTIATE_TEST_SUITE_P(Threads, WorkerPoolTest, ::testing::Values(1, 2, 3, 8));

TEST_P(WorkerPoolTest, RunsEachIndexOnce) {
  WorkerPool pool(GetParam());
  EXPECT_EQ(pool.threads(), GetParam());
  for (int count : {0, 1, 2, 3, 100, 5000}) {
    std::vector<int> runs(count);
    std::vector<int> workers(count, -1);
    pool.Run(count, [&](int worker, int index) {
      ++runs[index];
      workers[index] = worker;
    });
    EXPECT_EQ(runs, std::vector<int>(count, 1));
    for (int worker : workers) {
      EXPECT_GE(worker, 0);
      EXPECT_LT(worker, GetParam());
    }
  }
}

// Each job reads what the one before wrote, with plain memory: a late worker that ran an index of
// an old job, or a join that returned early, would show (and a race detector would tell).
TEST_P(WorkerPoolTest, JobsFollowEachOther) {
  WorkerPool pool(GetParam());
  std::vector<int> values(7);
  for (int job = 1; job <= 3000; ++job) {
    const std::vector<int> before = values;
    pool.Run(7, [&](int, int index) { values[index] = before[index] + 1; });
    for (int value : values) ASSERT_EQ(value, job);
    if (job % 500 == 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let them sleep
  }
}

TEST_P(WorkerPoolTest, AWorkerNumberIsUsedByOneThreadAtATime) {
  WorkerPool pool(GetParam());
  std::vector<std::atomic<int>> inside(GetParam());
  std::atomic<bool> shared = false;
  for (int job = 0; job < 200; ++job) {
    pool.Run(16, [&](int worker, int) {
      if (inside[worker].fetch_add(1) != 0) shared = true;
      inside[worker].fetch_sub(1);
    });
  }
  EXPECT_FALSE(shared);
}

TEST(WorkerPoolIdleTest, ManyWorkersTakePart) {
  WorkerPool pool(4);
  std::atomic<int> present = 0;
  // Each index waits for all four, so it ends only if four threads came; bounded by the test's
  // time.
  pool.Run(4, [&](int, int) {
    present.fetch_add(1);
    while (present.load() < 4) std::this_thread::yield();
  });
  EXPECT_EQ(present, 4);
}

TEST(WorkerPoolIdleTest, IdleWorkersUseNoCpu) {
  WorkerPool pool(4);
  pool.Run(100, [](int, int) {});
  // On a busy machine the workers get to the end of their spinning late. Three that spun for ever
  // would take a fifth of a core in every one of these stretches, unless dozens of others ran.
  double least = 1;
  for (int i = 0; i < 20 && least >= 0.02; ++i) {
    const std::clock_t before = std::clock();  // CPU time of the process, all threads
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    least = std::min(least, static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC);
  }
  EXPECT_LT(least, 0.02) << "s of CPU in 100 ms, at best";
}

TEST(WorkerPoolIdleTest, PoolsComeAndGo) {
  for (int i = 0; i < 50; ++i) {
    WorkerPool pool(1 + i % 5);
    std::atomic<int> sum = 0;
    if (i % 3 != 0) pool.Run(10, [&](int, int index) { sum += index; });
    EXPECT_EQ(sum, i % 3 != 0 ? 45 : 0);
  }
}

}  // namespace
}  // namespace espalier
