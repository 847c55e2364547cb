// Starts and watches rank_process.cc, for tests.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <fstream>
#include <functional>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "src/base/check.h"

namespace tandem::group {

struct RankProcessOptions {
  std::string host = "127.0.0.1";
  int64_t port = 0;
  int32_t rank = 0;
  int32_t size = 1;
  int64_t rank_timeout_us = 1'000'000;
  std::string node = "here";
  std::string network_host;
  std::vector<std::string> facts;
  std::vector<std::string> before;  // a command that runs it: {"ip", "netns", "exec", NAME}
};

class RankProcess {
 public:
  explicit RankProcess(const RankProcessOptions& options) {
    std::vector<std::string> words = options.before;
    const std::vector<std::string> own = {TANDEM_RANK_PROCESS,
                                          options.host,
                                          std::to_string(options.port),
                                          std::to_string(options.rank),
                                          std::to_string(options.size),
                                          std::to_string(options.rank_timeout_us),
                                          options.node,
                                          options.network_host};
    words.insert(words.end(), own.begin(), own.end());
    words.insert(words.end(), options.facts.begin(), options.facts.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    int in[2];
    int out[2];
    CHECK_EQ(::pipe2(in, O_CLOEXEC), 0);
    CHECK_EQ(::pipe2(out, O_CLOEXEC), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(in[0], STDIN_FILENO);
      ::dup2(out[1], STDOUT_FILENO);
      ::execvp(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(in[0]);
    ::close(out[1]);
    in_ = in[1];
    out_ = out[0];
  }
  ~RankProcess() {
    kill(SIGKILL);
    ::close(in_);
    ::close(out_);
  }
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  pid_t pid() const { return pid_; }
  void signal(int number) { ::kill(pid_, number); }
  // Ends it and waits for its end.
  void kill(int number) {
    if (pid_ < 0) return;
    ::kill(pid_, number);
    if (number == SIGKILL) ::kill(pid_, SIGCONT);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  void tell(const std::string& line) {
    const std::string text = line + "\n";
    CHECK_EQ(::write(in_, text.data(), text.size()), std::ssize(text));
  }

  // The next line that begins with `begin`, without it; others are skipped and can be read in said().
  std::optional<std::string> hear(const std::string& begin, int64_t timeout_us) {
    const auto begins = [&](const std::string& line) { return line.starts_with(begin); };
    const std::optional<std::string> line = hear_if(begins, timeout_us);
    return line ? std::optional(line->substr(begin.size())) : std::nullopt;
  }
  // The next line that has `text` in it.
  std::optional<std::string> hear_of(const std::string& text, int64_t timeout_us) {
    return hear_if([&](const std::string& line) { return line.find(text) != std::string::npos; }, timeout_us);
  }
  std::optional<std::string> hear_if(const std::function<bool(const std::string&)>& is_it, int64_t timeout_us) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(timeout_us);
    while (true) {
      for (size_t at = buffer_.find('\n'); at != std::string::npos; at = buffer_.find('\n')) {
        const std::string line = buffer_.substr(0, at);
        buffer_.erase(0, at + 1);
        said_ += line + "\n";
        if (is_it(line)) return line;
      }
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
      pollfd event{out_, POLLIN, 0};
      if (left.count() < 0 || ::poll(&event, 1, static_cast<int>(left.count()) + 1) <= 0) return std::nullopt;
      char bytes[4096];
      const ssize_t count = ::read(out_, bytes, sizeof bytes);
      if (count <= 0) return std::nullopt;
      buffer_.append(bytes, static_cast<size_t>(count));
    }
  }
  // Everything that hear() has gone through.
  const std::string& said() const { return said_; }

  // Processor time so far, in clock ticks, of all its threads.
  int64_t cpu_ticks() const {
    std::ifstream file("/proc/" + std::to_string(pid_) + "/stat");
    std::string text;
    std::getline(file, text);
    std::istringstream fields(text.substr(text.rfind(')') + 2));
    std::string skipped;
    for (int i = 0; i < 11; ++i) fields >> skipped;
    int64_t user = 0;
    int64_t system = 0;
    fields >> user >> system;
    return user + system;
  }

 private:
  pid_t pid_ = -1;
  int in_ = -1;
  int out_ = -1;
  std::string buffer_;
  std::string said_;
};

}  // namespace tandem::group
