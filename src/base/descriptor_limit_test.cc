#include "src/base/descriptor_limit.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

namespace tandem {
namespace {

// In a child, since a lowered hard limit cannot be raised again.
TEST(DescriptorLimit, RaisesTheSoftLimitToTheHardOne) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit low{100, 300};
    if (::setrlimit(RLIMIT_NOFILE, &low) != 0) ::_exit(2);
    const int64_t raised = raise_descriptor_limit();
    rlimit now{};
    ::getrlimit(RLIMIT_NOFILE, &now);
    ::_exit(raised == 300 && now.rlim_cur == 300 && now.rlim_max == 300 && raise_descriptor_limit() == 300 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(DescriptorLimit, SaysWhatIsMissing) {
  EXPECT_EQ(describe_descriptor_shortage(300, 300, "requests"), "");
  const std::string message = describe_descriptor_shortage(299, 300, "7 requests (--max-concurrent-requests)");
  for (const char* part : {"299", "300", "--max-concurrent-requests", "ulimit -Hn"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace tandem
