// Core counts from made-up cgroup trees, and from this machine.
#include "kernels/cpu/usable_cores.h"

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {
namespace {

class CgroupTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = ::testing::TempDir() + "usable_cores_" +
            ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path full = root_ + path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
  }

  std::string root_;
};

TEST_F(CgroupTest, NothingToReadIsNoLimit) { EXPECT_FALSE(CgroupCpuQuota(root_)); }

TEST_F(CgroupTest, Version2TakesTheTightestAncestor) {
  Write("/proc/self/cgroup", "0::/slice/pod/container\n");
  Write("/proc/self/mountinfo",
        "30 23 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n");
  Write("/sys/fs/cgroup/slice/pod/container/cpu.max", "max 100000\n");
  EXPECT_FALSE(CgroupCpuQuota(root_));
  Write("/sys/fs/cgroup/slice/pod/cpu.max", "250000 100000\n");
  Write("/sys/fs/cgroup/slice/cpu.max", "800000 100000\n");
  EXPECT_EQ(CgroupCpuQuota(root_), 2.5);
}

TEST_F(CgroupTest, Version2InsideANamespaceSeesItselfAsTheRoot) {
  Write("/proc/self/cgroup", "0::/\n");
  Write("/proc/self/mountinfo", "30 23 0:27 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
  Write("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(CgroupCpuQuota(root_), 0.5);
}

TEST_F(CgroupTest, Version1InAContainerSeesAPartOfTheTree) {
  Write("/proc/self/cgroup", "9:name=systemd:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n");
  Write("/proc/self/mountinfo",
        "32 31 0:28 /docker/abc /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
        "33 31 0:29 /docker/abc /sys/fs/cgroup/cpu ro shared:1 - cgroup cgroup rw,cpu,cpuacct\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  EXPECT_FALSE(CgroupCpuQuota(root_));
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n");
  EXPECT_EQ(CgroupCpuQuota(root_), 3);
}

TEST_F(CgroupTest, RubbishIsNoLimit) {
  Write("/proc/self/cgroup", "\n:\n0::/a\nrubbish\n");
  Write("/proc/self/mountinfo", "\n30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\nshort\n");
  Write("/sys/fs/cgroup/a/cpu.max", "many 0\n");
  EXPECT_FALSE(CgroupCpuQuota(root_));
}

TEST(UsableCoresTest, AtLeastOneAndNoMoreThanTheMachineHas) {
  EXPECT_GE(UsableCores(), 1);
  EXPECT_LE(UsableCores(), static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace
}  // namespace espalier
