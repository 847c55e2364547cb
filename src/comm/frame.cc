#include "src/comm/frame.h"

#include <algorithm>

namespace tandem::comm {
namespace {

constexpr uint16_t kFrameMagic = 0x4b54;  // "TK"

}  // namespace

FrameHeader make_header(FrameKind kind, size_t body_bytes, size_t payload_bytes, uint64_t number) {
  FrameHeader header;
  header.magic = kFrameMagic;
  header.kind = kind;
  header.body_bytes = static_cast<uint32_t>(body_bytes);
  header.payload_bytes = static_cast<uint32_t>(payload_bytes);
  header.number = number;
  return header;
}

Status check_header(const FrameHeader& header) {
  const auto bad = [](const char* what, uint64_t value, uint64_t limit) -> Status {
    return make_error(ErrorKind::kUnavailable, "damaged frame: {} is {}, expected at most {}", what, value, limit);
  };
  if (header.magic != kFrameMagic) return bad("the magic", header.magic, kFrameMagic);
  if (header.is_void > 1) return bad("the void flag", header.is_void, 1);
  switch (header.kind) {
    case FrameKind::kMessage: {
      const int64_t limit = header.payload_bytes > 0 ? kMaxHeaderBytes : kMaxMessageBytes;
      if (header.body_bytes > limit) return bad("the body", header.body_bytes, static_cast<uint64_t>(limit));
      if (header.payload_bytes > kMaxStreamPayloadBytes) return bad("the payload", header.payload_bytes, kMaxStreamPayloadBytes);
      if (header.num_pieces != 0) return bad("the number of pieces", header.num_pieces, 0);
      return {};
    }
    case FrameKind::kBorrowed: {
      if (header.payload_bytes != 0) return bad("the payload", header.payload_bytes, 0);
      if (header.num_pieces > kMaxPieces) return bad("the number of pieces", header.num_pieces, kMaxPieces);
      const size_t notes = sizeof(BorrowNote) + header.num_pieces * sizeof(BorrowPiece);
      if (header.body_bytes < notes) return bad("the room for the pieces", notes, header.body_bytes);
      if (header.body_bytes - notes > kMaxHeaderBytes) return bad("the message", header.body_bytes - notes, kMaxHeaderBytes);
      return {};
    }
    case FrameKind::kRead:
      if (header.body_bytes != sizeof(uint64_t)) return bad("the body", header.body_bytes, sizeof(uint64_t));
      if (header.payload_bytes != 0) return bad("the payload", header.payload_bytes, 0);
      return {};
  }
  return bad("the kind", static_cast<uint64_t>(header.kind), static_cast<uint64_t>(FrameKind::kRead));
}

Status check_greeting(const Greeting& greeting) {
  if (greeting.magic != kGreetingMagic || greeting.version != kGreetingVersion) {
    return make_error(ErrorKind::kUnavailable,
                      "not a KV transfer port of this version ({:#x}, {} instead of {:#x}, {}); both workers must be of "
                      "the same version, and either both or neither with --kv-transport ucx",
                      greeting.magic, greeting.version, kGreetingMagic, kGreetingVersion);
  }
  if (greeting.kind < GreetingKind::kFirst || greeting.kind > GreetingKind::kJoin ||
      greeting.transport > Transport::kTcp) {
    return make_error(ErrorKind::kUnavailable, "a greeting of kind {} for transport {}",
                      static_cast<uint32_t>(greeting.kind), static_cast<uint32_t>(greeting.transport));
  }
  return {};
}

void set_text(std::span<char> field, const std::string& text) {
  std::fill(field.begin(), field.end(), '\0');
  std::copy_n(text.begin(), std::min(text.size(), field.size() - 1), field.begin());
}

std::string text_of(std::span<const char> field) {
  return std::string(field.begin(), std::find(field.begin(), field.end(), '\0'));
}

}  // namespace tandem::comm
