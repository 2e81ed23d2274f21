#include "tests/simt/checked_memory.h"

#include <cstddef>
#include <random>
#include <span>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier::simt {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr size_t kCapacity = 4096;

std::vector<FaultKind> KindsOf(std::span<const Fault> faults) {
  std::vector<FaultKind> kinds;
  for (const Fault& fault : faults) kinds.push_back(fault.kind);
  return kinds;
}

TEST(CheckedMemory, TellsWhatIsNobodysOrWasNeverWritten) {
  CheckedMemory memory("device", kCapacity);
  std::byte* const at = memory.Allocate(12);
  std::vector<Fault> faults;
  const auto check = [&](std::ptrdiff_t from, size_t bytes, AccessKind kind) {
    faults.clear();
    memory.Check(at + from, bytes, {.launch = 1, .block = 2, .thread = 3, .kind = kind}, &faults);
    return KindsOf(faults);
  };
  EXPECT_THAT(check(0, 4, AccessKind::kWrite), IsEmpty());
  EXPECT_THAT(check(0, 4, AccessKind::kRead), IsEmpty());
  EXPECT_THAT(check(0, 8, AccessKind::kRead), ElementsAre(FaultKind::kUninitialised));
  EXPECT_THAT(faults[0].text, HasSubstr("8 bytes of device memory: read of block 2, thread 3"));
  EXPECT_THAT(check(4, 4, AccessKind::kAtomic), ElementsAre(FaultKind::kUninitialised));
  EXPECT_THAT(check(2, 4, AccessKind::kWrite), ElementsAre(FaultKind::kMisaligned));
  EXPECT_THAT(check(8, 8, AccessKind::kWrite), ElementsAre(FaultKind::kOutOfBounds));
  EXPECT_THAT(check(-4, 4, AccessKind::kWrite), ElementsAre(FaultKind::kOutOfBounds));
  EXPECT_THAT(check(12, 1, AccessKind::kRead), ElementsAre(FaultKind::kOutOfBounds));
  memory.Clear();
  EXPECT_THAT(check(0, 4, AccessKind::kWrite), ElementsAre(FaultKind::kOutOfBounds));
  EXPECT_EQ(memory.Allocate(12), at);
  EXPECT_THAT(check(0, 4, AccessKind::kRead), ElementsAre(FaultKind::kUninitialised));
  EXPECT_EQ(memory.Allocate(kCapacity), nullptr);
}

// Blocks one after the other, threads in any order, and now and then a barrier or the next launch.
std::vector<Access> RandomAccesses(std::mt19937* random) {
  std::vector<Access> accesses;
  Access next = {.launch = 1};
  for (unsigned count = 2 + (*random)() % 7; count > 0; --count) {
    const unsigned what = (*random)() % 8;
    if (what == 0) next = {.launch = next.launch + 1};
    if (what == 1) next = {.launch = next.launch, .block = next.block + 1};
    if (what == 2 || what == 3) ++next.barriers;
    next.thread = (*random)() % 3;
    next.kind = static_cast<AccessKind>((*random)() % 3);
    accesses.push_back(next);
  }
  return accesses;
}

// By the definition, over all pairs.
bool Races(const std::vector<Access>& accesses) {
  for (size_t later = 0; later < accesses.size(); ++later) {
    for (size_t earlier = 0; earlier < later; ++earlier) {
      const Access &a = accesses[earlier], &b = accesses[later];
      if (a.kind == b.kind && a.kind != AccessKind::kWrite) continue;
      if (a.launch != b.launch) continue;
      if (a.block != b.block || (a.thread != b.thread && a.barriers == b.barriers)) return true;
    }
  }
  return false;
}

TEST(CheckedMemory, KeepsEnoughOfThePastToSeeEveryRace) {
  std::mt19937 random(3);
  int races = 0;
  constexpr int kTraces = 20000;
  for (int trace = 0; trace < kTraces; ++trace) {
    CheckedMemory memory("shared", kCapacity);
    std::byte* const at = memory.Allocate(1);
    memory.MarkWritten(at, 1);
    const std::vector<Access> accesses = RandomAccesses(&random);
    std::vector<Fault> faults;
    for (const Access& access : accesses) memory.Check(at, 1, access, &faults);
    ASSERT_EQ(!faults.empty(), Races(accesses)) << "trace " << trace;
    races += Races(accesses) ? 1 : 0;
  }
  EXPECT_GT(races, kTraces / 10);
  EXPECT_LT(races, kTraces * 9 / 10);
}

}  // namespace
}  // namespace espalier::simt
