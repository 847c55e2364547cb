// Trying ports: listening on them for the moment of a check, and connecting to those of other hosts. The sockets of a
// check.
//
// A listener greets whoever connects with the check's token, so that a connection that ends at another program or
// another machine is told from one that arrived.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::check {

inline constexpr int64_t kMaxPorts = 1024;  // of one check on one host, and to connect to at once
inline constexpr size_t kMaxTokenBytes = 64;

enum class PortState : uint8_t {
  kFree,
  kTaken,    // another socket listens there
  kNotHere,  // the address is not one of this machine
  kDenied,   // by the system's rules
  kUnknownName,
  kFailed,  // for another reason
};
NLOHMANN_JSON_SERIALIZE_ENUM(PortState, {{PortState::kFailed, "failed"},
                                         {PortState::kFree, "free"},
                                         {PortState::kTaken, "taken"},
                                         {PortState::kNotHere, "not_here"},
                                         {PortState::kDenied, "denied"},
                                         {PortState::kUnknownName, "unknown_name"}})

struct ListenOutcome {
  PortState state = PortState::kFailed;
  int64_t port = 0;     // the port taken, where any was asked for
  std::string address;  // what the host's name was resolved to
  std::string text;     // of the fault
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(ListenOutcome, state, port, address, text)

enum class Reach : uint8_t {
  kReached,
  kOther,  // something answered that is not part of this check
  kRefused,
  kTimedOut,
  kUnreachable,  // said the network
  kUnknownName,
};
NLOHMANN_JSON_SERIALIZE_ENUM(Reach, {{Reach::kUnreachable, "unreachable"},
                                     {Reach::kReached, "reached"},
                                     {Reach::kOther, "other"},
                                     {Reach::kRefused, "refused"},
                                     {Reach::kTimedOut, "timed_out"},
                                     {Reach::kUnknownName, "unknown_name"}})

struct ConnectOutcome {
  Reach reach = Reach::kUnreachable;
  int64_t time_us = 0;
  std::string address;
  std::string text;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(ConnectOutcome, reach, time_us, address, text)

struct HostPort {
  std::string host;
  int64_t port = 0;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(HostPort, host, port)

// Asks the resolver, but not for longer than `timeout`.
Result<std::string> resolve_host(const std::string& host, std::chrono::milliseconds timeout);

class Listeners {
 public:
  // Listens wherever it can; outcomes() has one entry for each of `places`.
  Listeners(const std::vector<HostPort>& places, std::string token);
  ~Listeners();
  Listeners(const Listeners&) = delete;
  Listeners& operator=(const Listeners&) = delete;
  const std::vector<ListenOutcome>& outcomes() const { return outcomes_; }

 private:
  struct Greeter;
  std::vector<ListenOutcome> outcomes_;
  std::unique_ptr<Greeter> greeter_;
};

// All at once; each gets `timeout` for its connection and greeting. With an empty token whoever accepts is good.
std::vector<ConnectOutcome> connect_all(const std::vector<HostPort>& places, const std::string& token,
                                        std::chrono::milliseconds timeout);

}  // namespace tandem::check
