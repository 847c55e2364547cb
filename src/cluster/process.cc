#include "src/cluster/process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <fstream>
#include <nlohmann/json.hpp>

#include "src/base/options.h"

namespace tandem::cluster {
namespace {

constexpr int kExecFailed = 127;

// Runs in the child between fork and exec: only async-signal-safe calls.
[[noreturn]] void become(const char* program, char* const* argv, int input_fd, int log_fd, pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(kExecFailed);  // the parent died before the line above
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD, SIGPIPE, SIGHUP}) ::signal(signal, SIG_DFL);
  ::dup2(input_fd, STDIN_FILENO);
  ::dup2(log_fd, STDOUT_FILENO);
  ::dup2(log_fd, STDERR_FILENO);
  ::close_range(3, ~0U, 0);
  ::execv(program, argv);
  constexpr char kMessage[] = "exec of the program failed\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kMessage, sizeof kMessage - 1);
  ::_exit(kExecFailed);
}

}  // namespace

namespace {

const OptionSpec* find_secret(const std::string& word) {
  for (const OptionSpec& spec : option_table()) {
    if (spec.secret && word == fmt::format("--{}", spec.name)) return &spec;
  }
  return nullptr;
}

// A file descriptor from which `text` can be read.
Result<int> open_input(const std::string& text) {
  const int fd = text.empty() ? ::open("/dev/null", O_RDONLY | O_CLOEXEC) : ::memfd_create("tandem-input", MFD_CLOEXEC);
  const bool is_written = fd >= 0 && (text.empty() || (::write(fd, text.data(), text.size()) == std::ssize(text) &&
                                                       ::lseek(fd, 0, SEEK_SET) == 0));
  if (is_written) return fd;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  return make_error(ErrorKind::kUnavailable, "no input for a child process: {}", ::strerror(error));
}

}  // namespace

ChildCommand hide_secrets(const std::vector<std::string>& arguments) {
  ChildCommand child;
  nlohmann::json secrets = nlohmann::json::object();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const OptionSpec* const spec = find_secret(arguments[i]);
    if (spec == nullptr) {
      child.arguments.push_back(arguments[i]);
      continue;
    }
    nlohmann::json values = nlohmann::json::array();
    while (i + 1 < arguments.size() && !arguments[i + 1].starts_with("--")) values.push_back(arguments[++i]);
    secrets[std::string(spec->name)] = spec->type == OptionType::kList || values.empty() ? values : values.front();
  }
  if (secrets.empty()) return child;
  child.arguments.insert(child.arguments.end(), {"--secret-config", "/dev/stdin"});
  child.input = secrets.dump(-1, ' ', true);
  return child;
}

Result<pid_t> spawn_process(const std::string& program, const std::vector<std::string>& arguments,
                            const std::string& log_path) {
  const ChildCommand child = hide_secrets(arguments);
  TANDEM_ASSIGN(const int input_fd, open_input(child.input));
  const int log_fd = log_path == kOwnErrors
                         ? ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3)
                         : ::open(log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log_fd < 0) {
    ::close(input_fd);
    return make_error(ErrorKind::kUnavailable, "{}: cannot be opened for writing: {}", log_path, ::strerror(errno));
  }
  std::vector<char*> argv;
  argv.push_back(const_cast<char*>("tandem"));  // what ps shows
  for (const std::string& argument : child.arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) become(program.c_str(), argv.data(), input_fd, log_fd, parent);
  const int fork_errno = errno;
  ::close(input_fd);
  ::close(log_fd);
  if (pid < 0) return make_error(ErrorKind::kUnavailable, "cannot start {}: {}", program, ::strerror(fork_errno));
  ::setpgid(pid, pid);  // also here, so that the group exists before anyone signals it
  return pid;
}

std::string describe_exit(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int signal = WTERMSIG(wait_status);
    return fmt::format("signal {} ({})", signal, ::strsignal(signal));
  }
  return fmt::format("exit code {}", WEXITSTATUS(wait_status));
}

Status check_port_free(const std::string& host, int64_t port, const std::string& use) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (::inet_pton(AF_INET, host.c_str(), &address.sin_addr) != 1) {
    return invalid_argument("host", "'{}' is not an IPv4 address", host);
  }
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return make_error(ErrorKind::kUnavailable, "no socket can be made: {}", ::strerror(errno));
  const int on = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);  // a closed connection's leftover does not count
  const int bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int bind_errno = errno;
  ::close(fd);
  if (bound == 0) return {};
  return make_error(ErrorKind::kUnavailable, "port {} ({}) on {} cannot be used: {}; stop its owner or choose another",
                    port, use, host, ::strerror(bind_errno));
}

std::string tail_of_file(const std::string& path, size_t max_lines) {
  std::ifstream file(path);
  std::deque<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    lines.push_back(std::move(line));
    if (lines.size() > max_lines) lines.pop_front();
  }
  std::string text;
  for (const std::string& line : lines) text += "  " + line + "\n";
  return text;
}

}  // namespace tandem::cluster
