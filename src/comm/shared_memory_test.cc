#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "src/base/clock.h"
#include "src/comm/bell.h"
#include "src/comm/shared_region.h"

namespace tandem::comm {
namespace {

TEST(SharedRegion, AnotherProcessSeesWhatIsWritten) {
  SharedRegion region = SharedRegion::create("test", 10).value();
  ASSERT_GE(region.bytes(), 10);
  std::memcpy(region.data(), "from here", 10);
  const RegionAddress address = region.address();
  const pid_t child = ::fork();
  if (child == 0) {
    Result<SharedRegion> opened = SharedRegion::open(address, SharedRegion::Access::kReadWrite);
    if (!opened.ok() || std::memcmp(opened->data(), "from here", 10) != 0) ::_exit(1);
    std::memcpy(opened->data(), "and there", 10);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_STREQ(reinterpret_cast<const char*>(region.data()), "and there");
}

TEST(SharedRegion, OutlivesItsCreator) {
  SharedRegion opened;
  {
    SharedRegion region = SharedRegion::create("test", 4096).value();
    region.data()[4095] = std::byte{7};
    opened = SharedRegion::open(region.address(), SharedRegion::Access::kRead).value();
  }
  EXPECT_EQ(opened.data()[4095], std::byte{7});
}

TEST(SharedRegion, RefusesWhatIsNoRegion) {
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  for (const RegionAddress& address : {RegionAddress{::getpid(), pipe_ends[0], 4096}, RegionAddress{::getpid(), 9999, 4096}}) {
    EXPECT_FALSE(SharedRegion::open(address, SharedRegion::Access::kRead).ok());
  }
  SharedRegion region = SharedRegion::create("test", 4096).value();
  RegionAddress wrong = region.address();
  wrong.bytes = 8192;
  EXPECT_FALSE(SharedRegion::open(wrong, SharedRegion::Access::kRead).ok());
  ::close(pipe_ends[0]);
  ::close(pipe_ends[1]);
}

TEST(Bell, NoRingIsLost) {
  SharedRegion region = SharedRegion::create("bell", Bell::kBytes).value();
  Bell bell(region.data());
  constexpr int kRounds = 20'000;
  std::atomic<int> sent = 0;
  std::thread ringer([&] {
    for (int i = 1; i <= kRounds; ++i) {
      sent = i;
      bell.ring();
      while (sent == i) std::this_thread::yield();  // until it is taken
    }
  });
  const SteadyClock clock;
  for (int taken = 0; taken < kRounds;) {
    const uint32_t seen = bell.count();
    if (sent > 0) {
      sent = 0;
      ++taken;
      continue;
    }
    const int64_t begin_us = clock.now_us();
    bell.wait(seen, 2'000'000);
    ASSERT_LT(clock.now_us() - begin_us, 1'900'000) << "a ring was lost after " << taken;
  }
  ringer.join();
}

TEST(Bell, WaitEndsInTime) {
  SharedRegion region = SharedRegion::create("bell", Bell::kBytes).value();
  Bell bell(region.data());
  const SteadyClock clock;
  const int64_t begin_us = clock.now_us();
  bell.wait(bell.count(), 20'000);
  EXPECT_GE(clock.now_us() - begin_us, 19'000);
  bell.ring();
  bell.wait(bell.count() - 1, 60'000'000);  // has rung already
  EXPECT_LT(clock.now_us() - begin_us, 10'000'000);
}

}  // namespace
}  // namespace tandem::comm
