#include "src/cluster/process.h"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>

#include "src/base/options.h"

namespace tandem::cluster {
namespace {

TEST(HideSecrets, KeysBecomeTheInput) {
  const ChildCommand child =
      hide_secrets({"serve", "m", "--api-key", "one", "two: \"3\"", "--port", "1", "--prefill-api-key", "p"});
  EXPECT_EQ(child.arguments,
            (std::vector<std::string>{"serve", "m", "--port", "1", "--prefill-api-key", "p", "--secret-config", "/dev/stdin"}));
  EXPECT_EQ(child.input, R"({"api-key":["one","two: \"3\""]})");
  EXPECT_EQ(hide_secrets({"route", "--admin-api-key", "k"}).input, R"({"admin-api-key":"k"})");
}

TEST(HideSecrets, WithoutSecretsNothingChanges) {
  const std::vector<std::string> arguments{"serve", "m", "--port", "1"};
  EXPECT_EQ(hide_secrets(arguments).arguments, arguments);
  EXPECT_EQ(hide_secrets(arguments).input, "");
}

// What the child makes of it are the options of the whole command line.
TEST(HideSecrets, TheChildReadsThem) {
  const std::filesystem::path path = std::filesystem::temp_directory_path() / fmt::format("tandem-input-{}", ::getpid());
  ChildCommand child = hide_secrets({"serve", "m", "--api-key", "one", "two: \"3\""});
  std::ofstream(path) << child.input;
  child.arguments.back() = path;
  const Result<CommandLine> line = parse_command_line(child.arguments);
  std::filesystem::remove(path);
  ASSERT_TRUE(line.ok()) << line.error().message;
  EXPECT_EQ(line->options.list("api-key"), (std::vector<std::string>{"one", "two: \"3\""}));
}

TEST(SpawnProcess, ACommandLineShowsNoSecret) {
  const std::filesystem::path log = std::filesystem::temp_directory_path() / fmt::format("tandem-spawn-{}", ::getpid());
  // Prints its command line, then its input.
  const Result<pid_t> pid = spawn_process(
      "/bin/sh", {"-c", "tr '\\0' ' ' < /proc/$$/cmdline; cat; exit 0", "--api-key", "hidden"}, log.string());
  ASSERT_TRUE(pid.ok()) << pid.error().message;
  int status = 0;
  ASSERT_EQ(::waitpid(*pid, &status, 0), *pid);
  const std::string text = tail_of_file(log.string(), 10);
  std::filesystem::remove(log);
  const size_t input = text.find(R"({"api-key":["hidden"]})");
  ASSERT_NE(input, std::string::npos) << text;
  EXPECT_EQ(text.substr(0, input).find("hidden"), std::string::npos) << text;
}

}  // namespace
}  // namespace tandem::cluster
