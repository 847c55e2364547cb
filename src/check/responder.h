// What a host answers to the requests of a check, whether they come from this process or over HTTP to an agent.
//
// A request is {"op": …}: hello, facts, listen, connect, echo, measure, end. Listeners and echoes belong to a session,
// which the check names; one session at a time, and it ends by itself.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/base/clock.h"
#include "src/base/result.h"
#include "src/check/facts.h"
#include "src/check/ports.h"
#include "src/check/transport.h"

namespace tandem::check {

inline constexpr int kProtocol = 1;
inline constexpr int64_t kSessionIdleUs = 30'000'000;  // a session without a request ends after this
inline constexpr int64_t kMaxProcesses = 256;          // of one request for facts
inline constexpr size_t kMaxEchoes = 64;

// What a process with these arguments of `tandem` would be on this host; `num_ranks` of it are started here.
using ProcessExaminer = std::function<ProcessFacts(const std::vector<std::string>& arguments, int64_t num_ranks)>;

class Responder {
 public:
  explicit Responder(ProcessExaminer examine);
  ~Responder();

  // From any thread; blocks for as long as the operation takes. A request that is refused is an error.
  Result<nlohmann::json> answer(const nlohmann::json& request);
  // Ends the session if it has been idle for too long.
  void expire();

 private:
  Result<nlohmann::json> dispatch(const nlohmann::json& request);
  nlohmann::json hello() const;
  Result<nlohmann::json> facts(const nlohmann::json& request) const;
  Result<nlohmann::json> listen(const nlohmann::json& request);
  Result<nlohmann::json> echo(const nlohmann::json& request);
  Status enter_session(const std::string& id);

  const ProcessExaminer examine_;
  const SteadyClock clock_;
  std::mutex mutex_;  // of what follows
  std::string session_;
  int64_t last_request_us_ = 0;
  std::vector<std::unique_ptr<Listeners>> listeners_;
  std::vector<std::unique_ptr<TransportEcho>> echoes_;
};

}  // namespace tandem::check
