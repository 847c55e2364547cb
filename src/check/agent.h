// A responder behind HTTP, started on another host for the time of a check.
#pragma once

#include <cstdint>
#include <string>

#include "src/base/result.h"
#include "src/check/responder.h"

namespace tandem::check {

inline constexpr int64_t kDefaultAgentPort = 14500;
inline constexpr const char* kAgentPath = "/check";

struct AgentOptions {
  std::string host = "127.0.0.1";
  int64_t port = kDefaultAgentPort;
  double lifetime_s = 600;
};

// Answers until the lifetime is over, SIGINT or SIGTERM. `on_ready` is called with the port once it listens.
Status run_agent(const AgentOptions& options, ProcessExaminer examine,
                 const std::function<void(int64_t port)>& on_ready);

}  // namespace tandem::check
