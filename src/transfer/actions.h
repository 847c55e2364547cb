// What the state machines ask for. They have no clock, socket or memory of their own: time comes in with every event,
// and whoever drives them (agent_core.h in production, tests, a simulator) carries the actions out in order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "src/base/result.h"
#include "src/transfer/agent.h"
#include "src/transfer/wire.h"

namespace tandem::transfer {

// Tell the peer.
struct Tell {
  Message message;
};
// Copy the payload of the Data message being handled into these parts of our blocks, now.
struct Write {
  int64_t layer = 0;
  int64_t first_part = 0;
  int64_t num_parts = 0;
};
// The transfer is over; no action of this machine follows.
struct Finish {
  Status status;
  std::optional<FirstToken> first_token;
  int64_t bytes = 0;
  // Nothing was heard of the peer for the idle time-out: its connection is suspect too.
  bool peer_silent = false;
};

using Action = std::variant<Tell, Write, Finish>;
using Actions = std::vector<Action>;

// A time that never comes.
inline constexpr int64_t kNever = INT64_MAX;
// Heartbeats show that the peer lives, not that the transfer advances; without deadline this bounds the wait.
inline constexpr int64_t kMaxQuietUs = 600'000'000;
// The side that waits for its engine is heard of this many times per idle time-out of its peer.
inline constexpr int64_t kHeartbeatsPerIdle = 4;

// Remaining time for a message, and back to a deadline on this machine's clock; 0 means none on both sides.
inline int64_t remaining_us(int64_t deadline_us, int64_t now_us) {
  return deadline_us == 0 ? 0 : std::max<int64_t>(1, deadline_us - now_us);
}
inline int64_t earlier_deadline(int64_t deadline_us, int64_t remaining, int64_t now_us) {
  if (remaining == 0) return deadline_us;
  return deadline_us == 0 ? now_us + remaining : std::min(deadline_us, now_us + remaining);
}

}  // namespace tandem::transfer
