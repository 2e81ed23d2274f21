// Memory by made-up machines and cgroup trees, and by this one.
#include "engine/machine_memory.h"

#include <unistd.h>

#include <string>

#include "gtest/gtest.h"
#include "tests/support/made_up_root.h"

namespace espalier {
namespace {

constexpr uint64_t kMiB = 1 << 20;

std::string MiB(uint64_t count) { return std::to_string(count * kMiB) + "\n"; }

// 8 GiB, of which 6 are available.
class MachineMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_.Write("/proc/meminfo",
                "MemTotal:        8388608 kB\nMemFree:         1048576 kB\n"
                "MemAvailable:    6291456 kB\n");
  }

  void Expect(uint64_t total_mib, uint64_t available_mib) {
    const MachineMemory memory = ReadMachineMemory(root_.path());
    EXPECT_EQ(memory.total, total_mib * kMiB);
    EXPECT_EQ(memory.available, available_mib * kMiB);
  }

  void Version2() {
    root_.Write("/proc/self/cgroup", "0::/pod/container\n");
    root_.Write("/proc/self/mountinfo",
                "30 23 0:27 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n");
  }

  MadeUpRoot root_;
};

TEST_F(MachineMemoryTest, WithoutCgroupsIsTheMachines) { Expect(8192, 6144); }

TEST_F(MachineMemoryTest, Version2TakesTheTightestAncestor) {
  Version2();
  root_.Write("/sys/fs/cgroup/pod/container/memory.max", "max\n");
  root_.Write("/sys/fs/cgroup/pod/container/memory.current", MiB(1000));
  Expect(8192, 6144);
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(2048));
  root_.Write("/sys/fs/cgroup/pod/memory.current", MiB(1500));
  Expect(2048, 548);
  root_.Write("/sys/fs/cgroup/pod/container/memory.max", MiB(1200));
  Expect(1200, 200);
}

TEST_F(MachineMemoryTest, Version2SlowsBeforeItsLimit) {
  Version2();
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(2048));
  root_.Write("/sys/fs/cgroup/pod/memory.current", MiB(600));
  root_.Write("/sys/fs/cgroup/pod/memory.high", "max\n");
  Expect(2048, 1448);
  root_.Write("/sys/fs/cgroup/pod/memory.high", MiB(1000));
  Expect(1000, 400);
  root_.Write("/sys/fs/cgroup/pod/memory.max", "max\n");
  Expect(1000, 400);
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(800));
  Expect(800, 200);
}

TEST_F(MachineMemoryTest, StallsAreThoseOfTheMachineOrOfACgroup) {
  EXPECT_EQ(ReadMachineMemory(root_.path()).stalled, std::nullopt);
  root_.Write("/proc/pressure/memory",
              "some avg10=1.50 avg60=9.00 avg300=8.00 total=9\nfull avg10=77.00 avg60=0.00\n");
  EXPECT_EQ(ReadMachineMemory(root_.path()).stalled, 0.015);
  Version2();
  root_.Write("/sys/fs/cgroup/pod/container/memory.pressure", "some avg10=40.00 avg60=0.00\n");
  EXPECT_EQ(ReadMachineMemory(root_.path()).stalled, 0.4);
  for (const char* nonsense : {"", "some avg10=\n", "some avg10=nan\n", "some avg10=-4.00\n",
                               "some avg10=1e9\n", "some avg60=50.00\n"}) {
    root_.Write("/proc/pressure/memory", nonsense);
    EXPECT_EQ(ReadMachineMemory(root_.path()).stalled, 0.4) << nonsense;
  }
}

TEST_F(MachineMemoryTest, InactiveFilePagesCanBeHad) {
  Version2();
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(2048));
  root_.Write("/sys/fs/cgroup/pod/memory.current", MiB(1500));
  root_.Write("/sys/fs/cgroup/pod/memory.stat",
              "anon 1\nfile 2\ninactive_file_of_another_name 7\ninactive_file " + MiB(400) +
                  "active_file 9\n");
  Expect(2048, 948);
}

TEST_F(MachineMemoryTest, AFullCgroupHasNothingAndAWideOneDoesNotAdd) {
  Version2();
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(100));
  root_.Write("/sys/fs/cgroup/pod/memory.current", MiB(101));
  Expect(100, 0);
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(1 << 20));
  Expect(8192, 6144);
}

TEST_F(MachineMemoryTest, Version1CountsItsChildrenToo) {
  root_.Write("/proc/self/cgroup", "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n");
  root_.Write("/proc/self/mountinfo",
              "33 31 0:29 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
  root_.Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  root_.Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", MiB(700));
  Expect(8192, 6144);
  root_.Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", MiB(1024));
  root_.Write("/sys/fs/cgroup/memory/memory.stat",
              "inactive_file 5\ntotal_inactive_file " + MiB(200));
  Expect(1024, 524);
}

TEST_F(MachineMemoryTest, ForeignIsWhatIsNeitherAvailableNorOurs) {
  const auto statm = [&](uint64_t resident_mib, uint64_t shared_mib) {
    const uint64_t pages = kMiB / sysconf(_SC_PAGESIZE);
    root_.Write("/proc/self/statm", "9999999 " + std::to_string(resident_mib * pages) + " " +
                                        std::to_string(shared_mib * pages) + " 1 0 2 0\n");
  };
  statm(700, 200);
  EXPECT_EQ(ForeignMemoryBytes(root_.path()), (2048 - 500) * kMiB);
  statm(5000, 0);
  EXPECT_EQ(ForeignMemoryBytes(root_.path()), 0u);
  Version2();
  root_.Write("/sys/fs/cgroup/pod/memory.max", MiB(1024));
  root_.Write("/sys/fs/cgroup/pod/memory.current", MiB(600));
  statm(500, 0);
  EXPECT_EQ(ForeignMemoryBytes(root_.path()), 100 * kMiB);
}

TEST(MachineMemory, OfThisMachineIsThere) {
  const MachineMemory memory = ReadMachineMemory();
  EXPECT_GT(memory.available, 0u);
  EXPECT_GE(memory.total, memory.available);
  EXPECT_LE(ForeignMemoryBytes(), memory.total);
}

}  // namespace
}  // namespace espalier
