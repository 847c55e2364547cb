// Round trip and bandwidth through the transport that carries KV blocks: a messenger on each side.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "src/base/result.h"
#include "src/comm/messenger.h"

namespace tandem::check {

inline constexpr int64_t kMostTransportBytes = int64_t{64} << 20;  // of one measurement …
inline constexpr int64_t kSendingTimeUs = 300'000;                 // … which ends earlier on a slow link
inline constexpr int64_t kAnswerTimeUs = 4'000'000;                // for any answer of the other side
inline constexpr int kRoundTrips = 32;

struct TransportReading {
  std::string transport;     // "tcp/eth0 x4", "shared memory"
  double round_trip_us = 0;  // the median; below one where both sides watch shared memory
  int64_t bytes = 0;         // sent and confirmed …
  int64_t time_us = 0;       // … in this time
  double bytes_per_s() const {
    return time_us > 0 ? static_cast<double>(bytes) * 1e6 / static_cast<double>(time_us) : 0;
  }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(TransportReading, transport, round_trip_us, bytes, time_us)

// Answers measurements on a thread of its own until it is destroyed.
class TransportEcho {
 public:
  // Port 0 is any free one.
  static Result<std::unique_ptr<TransportEcho>> start(const std::string& host, int64_t port);
  ~TransportEcho();
  int64_t port() const { return messenger_->port(); }

 private:
  struct Handler;
  TransportEcho();
  std::unique_ptr<Handler> handler_;
  std::unique_ptr<comm::Messenger> messenger_;
  std::atomic<bool> ends_{false};
  std::thread thread_;
};

// From `own_host`, an address of this machine, to an echo at `host`. Takes at most a few kAnswerTimeUs.
Result<TransportReading> measure_transport(const std::string& own_host, const std::string& host, int64_t port);

}  // namespace tandem::check
