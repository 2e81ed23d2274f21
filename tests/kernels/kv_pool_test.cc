// KV pages move, and memory beyond the last of them really goes back to the machine.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

uint64_t ResidentBytes() {
  uint64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

TEST(KvPool, MovesPagesAndGivesMemoryBack) {
  const std::unique_ptr<Backend> backend = CreateCpuBackend({.threads = 1}).value();
  constexpr int kPages = 4000;
  KvPool pool = backend->CreateKvPool({.pages = kPages, .kv_heads = 3, .head_dim = 64}).value();
  const size_t bytes = pool.shape.page_bytes();
  for (int page = 0; page < kPages; ++page) {
    std::memset(pool.data + page * bytes, page % 251, bytes);
  }
  const uint64_t before = ResidentBytes();
  constexpr std::pair<int32_t, int32_t> kMoves[] = {{kPages - 1, 1}, {2000, 0}};
  backend->FitKvPool(kMoves, 3, &pool);
  EXPECT_GT(before, ResidentBytes() + (kPages - 3) * bytes * 9 / 10);
  const auto all = [&](int page, int value) {
    return std::all_of(pool.data + page * bytes, pool.data + (page + 1) * bytes,
                       [=](std::byte each) { return static_cast<int>(each) == value; });
  };
  EXPECT_TRUE(all(0, 2000 % 251));
  EXPECT_TRUE(all(1, (kPages - 1) % 251));
  EXPECT_TRUE(all(2, 2)) << "the last that stays";
  std::memset(pool.data + (kPages - 1) * bytes, 7, bytes);  // it may come back
  EXPECT_TRUE(all(kPages - 1, 7));
}

}  // namespace
}  // namespace espalier
