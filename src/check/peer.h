// One host of a check: this one, whose responder is called, or another one, whose agent is asked over HTTP.
#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "src/base/result.h"
#include "src/check/responder.h"

namespace tandem::check {

class Peer {
 public:
  // `own`: of this process, for this host; null for another.
  Peer(std::string host, int64_t agent_port, Responder* own);

  bool is_here() const { return own_ != nullptr; }
  // Blocks until the answer or, on another host, `limit`.
  Result<nlohmann::json> ask(const nlohmann::json& request, std::chrono::milliseconds limit) const;

 private:
  std::string host_;
  int64_t agent_port_;
  Responder* own_;
};

}  // namespace tandem::check
