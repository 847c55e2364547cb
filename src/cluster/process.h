// Starting a child that cannot outlive us, and saying how it ended.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::cluster {

// A child's command line without the values of secret options (OptionSpec::secret), which every user of the machine could
// read there: they are its standard input instead, which --secret-config names.
struct ChildCommand {
  std::vector<std::string> arguments;
  std::string input;  // YAML; "" for none
};
ChildCommand hide_secrets(const std::vector<std::string>& arguments);

// Starts `program` with `arguments`, secrets hidden, in a process group of its own so that a Ctrl-C in the terminal reaches only us,
// with stdout and stderr appended to `log_path`, no other open file, and SIGKILL when the calling thread dies.
// Returns its pid, which is also its process group. kOwnErrors instead of a path: where our own stderr goes.
inline constexpr const char* kOwnErrors = "";
Result<pid_t> spawn_process(const std::string& program, const std::vector<std::string>& arguments,
                            const std::string& log_path);

// "exit code 1", "signal 9 (Killed)" from a status of waitpid.
std::string describe_exit(int wait_status);

// An error that names the port if another socket listens on it.
Status check_port_free(const std::string& host, int64_t port, const std::string& use);

// The last lines of a file, for messages; empty if it cannot be read.
std::string tail_of_file(const std::string& path, size_t max_lines);

// The running program. The link is resolved in the child, where it is the same file, even if that was rebuilt since.
inline constexpr const char* kOwnProgram = "/proc/self/exe";

}  // namespace tandem::cluster
