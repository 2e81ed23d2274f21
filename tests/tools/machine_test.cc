#include "tools/machine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace espalier {
namespace {

constexpr char kStat[] =
    "cpu  1000 1000 1000 1000 1000 1000 1000 1000 0 0\n"
    "cpu0 1 2 3 400 500 6 7 8 9 10\n"
    "cpu1 10 20 30 4000 5000 60 70 80 90 100\n"
    "cpu2 100 200 300 40000 50000 600 700 800 900 1000\n"
    "intr 12345 0 0\n"
    "ctxt 99\n";

TEST(ParseProcStat, CountsBusyTimeOfOurCores) {
  const CpuTicks ticks = ParseProcStat(kStat, [](int core) { return core != 2; });
  EXPECT_EQ(ticks.cores, 2);
  EXPECT_EQ(ticks.busy, 27u + 270u);
}

TEST(ParseProcStat, OfNothingIsNothing) {
  EXPECT_EQ(ParseProcStat("", [](int) { return true; }).cores, 0);
  EXPECT_EQ(ParseProcStat("cpu 1 2 3\ncpux 1\n", [](int) { return true; }).cores, 0);
}

TEST(CpuWatch, TellsNothingOfATooShortStretch) {
  EXPECT_FALSE(CpuWatch().OthersShare().has_value());
}

TEST(CpuWatch, OwnWorkIsNotOthers) {
  CpuWatch watch;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
  std::atomic<int> spins = 0;
  while (std::chrono::steady_clock::now() < end) ++spins;
  const std::optional<double> share = watch.OthersShare();
  if (!share) GTEST_SKIP() << "/proc/stat is not readable";
  EXPECT_GE(*share, 0);
  EXPECT_LE(*share, 1);
}

TEST(MeasureCeilings, FindsPlausibleFiguresOnEveryIsa) {
  for (const Isa isa : SupportedIsas()) {
    int last = -1;
    const MeasuredCeilings ceilings = MeasureCeilings(isa, 1, 1 << 20, [&](int done, int total) {
      EXPECT_GT(done, last);
      EXPECT_EQ(total, 4);
      last = done;
    });
    EXPECT_EQ(last, 4);
    EXPECT_EQ(ceilings.read_footprint, size_t{1} << 20);
    EXPECT_GT(ceilings.read_bytes_per_s_1, 1e7);
    EXPECT_GT(ceilings.all.read_bytes_per_s, 1e7);
    EXPECT_GT(ceilings.all.f32_ops_per_s, 1e7);
    EXPECT_GT(ceilings.all.int8_ops_per_s, 1e7);
    // More than two ports at 6 GHz can do is a loop that was optimised away.
    const double lanes = isa >= Isa::kAvx512Vnni ? 16 : isa >= Isa::kAvx2 ? 8 : 4;
    EXPECT_LT(ceilings.all.f32_ops_per_s, 2 * 2 * lanes * 6e9);
    EXPECT_LT(ceilings.all.int8_ops_per_s, 2 * 2 * 4 * lanes * 6e9);
  }
}

}  // namespace
}  // namespace espalier
