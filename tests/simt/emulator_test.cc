// What a device tells of launches, votes and stacks. Mistakes in loads and stores are
// mutants_test's: these kernels are plain C++, whose compiler tells of none.
#include "tests/simt/emulator.h"

#include <cstddef>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/arch.cuh"

namespace espalier::simt {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr unsigned kThreads = 64;

void EmptyKernel() {}

TEST(Emulator, TakesNoStreamButTheDevices) {
  Device device(0);
  EXPECT_EQ(Launch(&EmptyKernel, 1, kThreads, device.stream()), 0);
  EXPECT_THAT(device.faults(), IsEmpty());
  char other;
  Launch(&EmptyKernel, 1, kThreads, reinterpret_cast<CUstream_st*>(&other));
  Launch(&EmptyKernel, 1, kThreads, nullptr);
  ASSERT_EQ(device.faults().size(), 2);
  EXPECT_EQ(device.faults()[0].kind, FaultKind::kStream);
  EXPECT_THAT(device.faults()[0].text, HasSubstr("not the device's"));
  EXPECT_EQ(device.faults()[1].kind, FaultKind::kStream);
  EXPECT_THAT(device.faults()[1].text, HasSubstr("default"));
}

void HalfWarpVotesKernel() { __ballot_sync(0xffff, true); }

TEST(Emulator, TellsOfAVoteOfSomeLanes) {
  Device device(0);
  Launch(&HalfWarpVotesKernel, 2, kThreads, device.stream());
  ASSERT_EQ(device.faults().size(), 1);
  EXPECT_EQ(device.faults()[0].kind, FaultKind::kPartialWarp);
  EXPECT_THAT(device.faults()[0].text, HasSubstr("expected all lanes, found 0xffff"));
}

// From the end on, as calls do.
void LastThreadFillsStackKernel(size_t bytes) {
  if (threadIdx.x != kThreads - 1) return;
  volatile char* const filled = static_cast<char*>(__builtin_alloca(bytes));
  for (size_t i = bytes; i-- > 0;) filled[i] = 1;
}

// Its neighbours' stacks are free by then and would hide it.
TEST(EmulatorDeathTest, OfAThreadThatOutgrowsItsStack) {
  Device device(0);
  Launch(&LastThreadFillsStackKernel, 1, kThreads, device.stream(), 32 << 10);
  EXPECT_DEATH(Launch(&LastThreadFillsStackKernel, 1, kThreads, device.stream(), 96 << 10), "");
}

}  // namespace
}  // namespace espalier::simt
