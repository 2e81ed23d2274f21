// Core counts from made-up cgroup trees, and from this machine.
#include "kernels/cpu/usable_cores.h"

#include <thread>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/made_up_root.h"

namespace espalier {
namespace {

TEST(CgroupCpuQuotaTest, NothingToReadIsNoLimit) {
  const MadeUpRoot root;
  EXPECT_FALSE(CgroupCpuQuota(root.path()));
}

TEST(CgroupCpuQuotaTest, Version2TakesTheTightestAncestor) {
  const MadeUpRoot root;
  root.Write("/proc/self/cgroup", "0::/slice/pod/container\n");
  root.Write("/proc/self/mountinfo",
             "30 23 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n");
  root.Write("/sys/fs/cgroup/slice/pod/container/cpu.max", "max 100000\n");
  EXPECT_FALSE(CgroupCpuQuota(root.path()));
  root.Write("/sys/fs/cgroup/slice/pod/cpu.max", "250000 100000\n");
  root.Write("/sys/fs/cgroup/slice/cpu.max", "800000 100000\n");
  EXPECT_EQ(CgroupCpuQuota(root.path()), 2.5);
}

TEST(CgroupCpuQuotaTest, Version2InsideANamespaceSeesItselfAsTheRoot) {
  const MadeUpRoot root;
  root.Write("/proc/self/cgroup", "0::/\n");
  root.Write("/proc/self/mountinfo", "30 23 0:27 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
  root.Write("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(CgroupCpuQuota(root.path()), 0.5);
}

TEST(CgroupCpuQuotaTest, Version1InAContainerSeesAPartOfTheTree) {
  const MadeUpRoot root;
  root.Write("/proc/self/cgroup", "9:name=systemd:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n");
  root.Write(
      "/proc/self/mountinfo",
      "32 31 0:28 /docker/abc /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
      "33 31 0:29 /docker/abc /sys/fs/cgroup/cpu ro shared:1 - cgroup cgroup rw,cpu,cpuacct\n");
  root.Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  root.Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  EXPECT_FALSE(CgroupCpuQuota(root.path()));
  root.Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n");
  EXPECT_EQ(CgroupCpuQuota(root.path()), 3);
}

TEST(CgroupCpuQuotaTest, RubbishIsNoLimit) {
  const MadeUpRoot root;
  root.Write("/proc/self/cgroup", "\n:\n0::/a\nrubbish\n");
  root.Write("/proc/self/mountinfo",
             "\n30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\nshort\n");
  root.Write("/sys/fs/cgroup/a/cpu.max", "many 0\n");
  EXPECT_FALSE(CgroupCpuQuota(root.path()));
}

TEST(UsableCoresTest, AtLeastOneAndNoMoreThanTheMachineHas) {
  EXPECT_GE(UsableCores(), 1);
  EXPECT_LE(UsableCores(), static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace
}  // namespace espalier
