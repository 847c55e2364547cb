// What ranks and the coordinator of a group say to each other: JSON objects, each behind its length (MessageStream).
//
//   rank -> coordinator   join, window, mapped, fault, leave, beat
//   coordinator -> rank   refused, form, map, open, ended, beat
//
// docs/rank-groups.md has the order. Everything that arrives is checked: exact keys, types, ranges, lengths.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "src/base/result.h"
#include "src/comm/shared_region.h"
#include "src/group/fabric.h"
#include "src/group/shape.h"

namespace tandem::group {

// Changes whenever a message does.
inline constexpr int64_t kProtocolVersion = 2;
inline constexpr int64_t kMaxTextBytes = 1024;     // of reasons and addresses
inline constexpr int64_t kMaxNodeBytes = 256;      // of a node id
inline constexpr int64_t kMaxNetworkBytes = 3072;  // of what a rank says about how the network reaches its window

struct JoinMessage {
  int64_t protocol = kProtocolVersion;
  int32_t rank = 0;  // not yet checked against the group's size
  GroupShape shape;
  uint64_t incarnation = 0;  // random, of the process
  uint64_t attempt = 0;      // grows with each join of one incarnation
  int64_t pid = 0;
  std::string node;
  std::string http_address;
  int64_t rank_timeout_us = 0;
  uint64_t last_epoch = 0;  // the latest one that this rank has heard of, so that a new coordinator counts on
  std::vector<Fact> facts;
  std::vector<Fact> options;  // as this rank was given them: they may differ, and are named where a fact does
};

struct RefusedMessage {
  bool lasting = false;  // will be refused again
  std::string why;
};

// "Make your window of this epoch."
struct FormMessage {
  Epoch epoch;
  std::vector<std::string> nodes;  // of each rank
};

// How others reach a rank's memory of one epoch.
struct WindowAddress {
  comm::RegionAddress region;
  comm::RegionAddress bell;
  uint64_t stamp = 0;   // lies at the end of the region: tells it from another one of the same size
  std::string network;  // for ranks of other nodes, empty if there are none
};

struct WindowMessage {
  Epoch epoch;
  WindowAddress address;
};

// "All have made theirs: map them."
struct MapMessage {
  Epoch epoch;
  std::vector<WindowAddress> windows;  // of each rank
};

struct MappedMessage {
  Epoch epoch;
};

// "All have mapped all: compute."
struct OpenMessage {
  Epoch epoch;
};

struct EndedMessage {
  Epoch epoch;          // 0: none was formed
  bool fenced = false;  // the receiver is no member any more and has to join again
  std::string why;      // names the rank
};

struct FaultMessage {
  Epoch epoch;
  int32_t suspect = -1;  // a rank, or -1
  std::string why;
};

struct LeaveMessage {
  std::string why;
};

// A sign of life. The coordinator's says how the group is.
struct BeatMessage {
  std::string text;
};

using Message = std::variant<JoinMessage, RefusedMessage, FormMessage, WindowMessage, MapMessage, MappedMessage,
                             OpenMessage, EndedMessage, FaultMessage, LeaveMessage, BeatMessage>;

const char* message_name(const Message& message);  // "join", …
std::string encode_message(const Message& message);
// Errors: kDataLoss, saying what is wrong. A join of another protocol version has only `protocol` filled in.
Result<Message> decode_message(std::string_view text);

// At most kMaxTextBytes of `text`.
std::string clip_text(std::string text);

}  // namespace tandem::group
