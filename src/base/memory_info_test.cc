#include "src/base/memory_info.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>

#include "src/base/control_group.h"

namespace tandem {
namespace {

// A small machine made of files.
class MemoryInfo : public testing::Test {
 protected:
  void SetUp() override { write("/proc/meminfo", "MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable: 4000 kB\n"); }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  std::string root_ = testing::TempDir() + "memory_info_" + std::to_string(::getpid());
};

TEST_F(MemoryInfo, WithoutLimitsItIsMemAvailable) {
  EXPECT_EQ(available_memory(root_).bytes, 4000 * 1024);
  EXPECT_EQ(available_memory(root_).limited_by, "MemAvailable");
}

TEST_F(MemoryInfo, TightestGroupOfVersion2Counts) {
  write("/proc/self/cgroup", "0::/pod/box\n");
  write("/sys/fs/cgroup/pod/box/memory.max", "max\n");
  write("/sys/fs/cgroup/pod/box/memory.current", "700000\n");
  write("/sys/fs/cgroup/pod/memory.max", "1000000\n");
  write("/sys/fs/cgroup/pod/memory.current", "900000\n");
  write("/sys/fs/cgroup/pod/memory.stat", "anon 600000\ninactive_file 300000\n");
  EXPECT_EQ(available_memory(root_).bytes, 400000);
  EXPECT_NE(available_memory(root_).limited_by.find("/pod/memory.max"), std::string::npos);
}

TEST_F(MemoryInfo, Version1InsideAContainer) {
  write("/proc/self/cgroup", "7:cpu:/x\n4:memory:/docker/abc\n");  // the path is the host's and not visible here
  write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n");
  write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "500000\n");
  EXPECT_EQ(available_memory(root_).bytes, 1500000);
}

TEST_F(MemoryInfo, ProcessorQuotaIsThatOfTheTightestGroup) {
  EXPECT_EQ(processor_quota(root_), std::numeric_limits<double>::infinity());
  write("/proc/self/cgroup", "0::/pod/box\n");
  write("/sys/fs/cgroup/pod/box/cpu.max", "max 100000\n");
  EXPECT_EQ(processor_quota(root_), std::numeric_limits<double>::infinity());
  write("/sys/fs/cgroup/pod/cpu.max", "250000 100000\n");
  EXPECT_EQ(processor_quota(root_), 2.5);
}

TEST_F(MemoryInfo, ProcessorQuotaOfVersion1) {
  write("/proc/self/cgroup", "4:cpu,cpuacct:/docker/abc\n");
  write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(processor_quota(root_), std::numeric_limits<double>::infinity());
  write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n");
  EXPECT_EQ(processor_quota(root_), 1.5);
}

TEST_F(MemoryInfo, ThisMachineHasSome) { EXPECT_GT(available_memory().bytes, int64_t{1} << 20); }

}  // namespace
}  // namespace tandem
