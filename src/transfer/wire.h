// The messages between two agents: a fixed binary schema, little endian. docs/transfer.md has the table.
//
// Every message begins with 8 bytes: magic (u16), version (u8), type (u8), length of the whole message (u32).
// A decoder believes nothing: lengths, counts, enumerators and ranges are checked before they are used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "src/base/kv_transfer_config.h"
#include "src/base/result.h"
#include "src/model/kv_cache.h"
#include "src/transfer/agent.h"
#include "src/transfer/handle.h"

namespace tandem::transfer {

inline constexpr uint8_t kWireVersion = 4;
inline constexpr size_t kMaxNameBytes = 512;   // engine id, model fingerprint
inline constexpr size_t kMaxTextBytes = 1024;  // reasons
inline constexpr size_t kMaxTopLogprobs = 1024;
inline constexpr int64_t kMaxBlockTokens = 1024;  // that a peer may have; --block-size allows fewer

// First message of both sides.
struct Hello {
  std::string engine_id;  // "<engine_id>:<incarnation>"
  std::string fingerprint;
  KvRole role = KvRole::kBoth;
  int64_t idle_timeout_us = 0;  // the peer shall be heard of more often than this
  model::KvLayout layout;
};
// "I will not work with you", with the reason; then the connection closes.
struct Refuse {
  std::string text;
};
// Prefill to decode, push: I have what you expect.
struct Begin {
  Handle handle;
  int64_t num_tokens = 0;    // of the whole prompt
  int64_t first_token = 0;   // earlier ones are not offered
  int64_t remaining_us = 0;  // until the sender's deadline; 0: none
  Hash256 prompt{};          // BlockSpan::prompt
};
// Decode to prefill, push: send from the block with first_token on; num_tokens if none is needed.
struct Accept {
  Handle handle;
  int64_t first_token = 0;
};
// Decode to prefill, pull: send me what you published, as after Accept.
struct Pull {
  Handle handle;
  int64_t num_tokens = 0;
  int64_t first_token = 0;
  int64_t remaining_us = 0;
  Hash256 prompt{};
};
// Parts [first_part, first_part + num_parts) of one layer of the sender's blocks; the payload holds their bytes
// (part_grid.h).
struct Data {
  Handle handle;
  int64_t layer = 0;
  int64_t first_part = 0;
  int64_t num_parts = 0;
  std::optional<uint64_t> checksum;  // of the payload
};
// Everything has been sent: this many bytes of payload, and the first token of a push.
struct Commit {
  Handle handle;
  int64_t num_tokens = 0;
  int64_t num_bytes = 0;
  std::optional<FirstToken> first_token;
};
// The receiver has everything; the sender's blocks are free.
struct Ack {
  Handle handle;
  int64_t num_bytes = 0;
};

// The machine on the other side that a message is for; one process may hold both of one handle.
enum class Side : uint8_t { kSender = 0, kReceiver = 1 };

struct Abort {
  Handle handle;
  Side to = Side::kSender;
  std::string text;
  Hash256 prompt{};  // to a sender: of the one who ends it; a publication of another prompt stays
};
struct AbortAck {
  Handle handle;
  Side to = Side::kSender;
};
// To a receiver: the sender lives, though there is nothing to send. To a sender: extends the lease of a publication.
struct Heartbeat {
  Handle handle;
  Side to = Side::kReceiver;
};

enum class FaultCode : uint8_t {
  kUnknownHandle,  // never made here, or forgotten
  kConsumed,       // used before
  kExpired,        // lease or deadline passed
  kAborted,
  kOutOfRange,   // blocks, layers or parts that the transfer does not have
  kWrongLength,  // tokens or bytes
  kOtherPrompt,  // the two sides mean different prompts
  kChecksum,
  kProtocol,  // not in this state
};
inline constexpr uint8_t kNumFaultCodes = 9;
const char* fault_code_name(FaultCode code);  // "unknown_handle", …

// The answer to a message that cannot be honoured; ends the transfer on the side it is for.
struct Fault {
  Handle handle;
  Side to = Side::kSender;
  FaultCode code = FaultCode::kProtocol;
  std::string text;
};

using Message = std::variant<Hello, Refuse, Begin, Accept, Pull, Data, Commit, Ack, Abort, AbortAck, Heartbeat, Fault>;

const char* message_name(const Message& message);

// Texts longer than their limit are cut.
std::vector<std::byte> encode(const Message& message);
// The error says what is wrong with the bytes; of another version, both versions.
Result<Message> decode(std::span<const std::byte> bytes);

// The error that the API gives for a fault reported by a peer.
Error to_error(const Fault& fault, const std::string& peer);

// Success if two engines may exchange KV, or an error with both values of what differs. Blocks may differ in size.
Status check_compatible(const Hello& mine, const Hello& theirs);

}  // namespace tandem::transfer
