// What travels on the streams of stream_messenger.cc. Both ends run on little-endian machines; structures travel as they
// are. A frame is a header, a body and, if it has a payload, the payload and a mark that says whether the payload counts.
// The frames of a connection are numbered; its streams deliver them in that order.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "src/comm/messenger.h"

namespace tandem::comm {

static_assert(std::endian::native == std::endian::little);

enum class FrameKind : uint8_t {
  kMessage = 1,   // body: the message
  kBorrowed = 2,  // body: the message, a BorrowNote and its pieces; the payload lies in the sender's memory
  kRead = 3,      // body: a uint64, how many borrowed payloads of this connection the receiver is done with
};

struct FrameHeader {
  uint16_t magic = 0;
  FrameKind kind = FrameKind::kMessage;
  uint8_t is_void = 0;  // the sender took it back before it began: drop it
  uint32_t body_bytes = 0;
  uint32_t payload_bytes = 0;  // of kMessage
  uint32_t num_pieces = 0;     // of kBorrowed
  uint64_t number = 0;         // 1, 2, … within the connection
};
static_assert(sizeof(FrameHeader) == 24);

struct BorrowNote {
  uint64_t ticket = 0;
  uint64_t slot = 0;
};
struct BorrowPiece {
  uint64_t offset = 0;  // into the sender's memory
  uint64_t bytes = 0;
};

// Behind a payload.
enum class PayloadMark : uint32_t { kWhole = 0x4c4f4857, kVoid = 0x44494f56 };

// Larger than over UCX, because each payload costs calls to the kernel on both sides.
inline constexpr int64_t kMaxStreamPayloadBytes = 256 * 1024;
inline constexpr int64_t kMaxBodyBytes =
    kMaxMessageBytes + static_cast<int64_t>(sizeof(BorrowNote)) + kMaxPieces * static_cast<int64_t>(sizeof(BorrowPiece));
inline constexpr int64_t kMaxFrameBytes = static_cast<int64_t>(sizeof(FrameHeader) + sizeof(PayloadMark)) +
                                          (kMaxBodyBytes > kMaxHeaderBytes + kMaxStreamPayloadBytes
                                               ? kMaxBodyBytes
                                               : kMaxHeaderBytes + kMaxStreamPayloadBytes);

FrameHeader make_header(FrameKind kind, size_t body_bytes, size_t payload_bytes, uint64_t number);
// An error for what no sender of this version makes.
Status check_header(const FrameHeader& header);
inline size_t frame_bytes(const FrameHeader& header) {
  return sizeof header + header.body_bytes + header.payload_bytes + (header.payload_bytes > 0 ? sizeof(PayloadMark) : 0);
}

// --- the greeting: how two messengers meet ---

// A memfd of the sender, with what tells it from another one of the same number in another container.
struct SharedOffer {
  int32_t pid = 0;
  int32_t fd = -1;  // -1: nothing to share
  int64_t bytes = 0;
  uint64_t device = 0;
  uint64_t inode = 0;
};

enum class GreetingKind : uint32_t {
  kFirst = 1,   // who connected
  kAnswer = 2,  // who accepted: has tried to map the other's memory
  kMapped = 3,  // who connected: has tried, too; frames follow
  kJoin = 4,    // on a further stream of a connection: `key` of the answer; frames follow
};

inline constexpr uint32_t kGreetingMagic = 0x504e4454;  // "TDNP", as of UCX's meeting …
inline constexpr uint32_t kGreetingVersion = 3;         // … which is version 1

struct Greeting {
  uint32_t magic = kGreetingMagic;
  uint32_t version = kGreetingVersion;
  GreetingKind kind = GreetingKind::kFirst;
  Transport transport = Transport::kAuto;
  uint8_t can_read = 0;  // the sender has mapped the peer's memory
  char boot_id[40] = {};
  char key[36] = {};
  char reason[136] = {};  // why it has not
  SharedOffer memory;
  SharedOffer tickets;
};
static_assert(sizeof(Greeting) == 296);

// "" or an error that says what is wrong.
Status check_greeting(const Greeting& greeting);
void set_text(std::span<char> field, const std::string& text);  // cut, and closed by a zero
std::string text_of(std::span<const char> field);

}  // namespace tandem::comm
