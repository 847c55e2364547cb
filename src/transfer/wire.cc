#include "src/transfer/wire.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

namespace tandem::transfer {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they lie in memory");

constexpr uint16_t kMagic = 0x4b54;  // "TK"
constexpr size_t kPrefixBytes = 8;
constexpr int64_t kMaxNumber = int64_t{1} << 48;  // tokens, blocks, bytes: far beyond any machine, far below overflow

// Writes and reads share one description per message: visit() names the fields in order, and an Archive is either
// a Writer or a Reader.
class Writer {
 public:
  template <typename T>
  void number(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    const size_t at = bytes_.size();
    bytes_.resize(at + sizeof value);
    std::memcpy(bytes_.data() + at, &value, sizeof value);
  }
  template <typename T>
  void choice(const T& value, uint8_t /*count*/) {
    number(static_cast<uint8_t>(value));
  }
  void count(const int64_t& value) { number(value); }
  void flag(const bool& value) { number(static_cast<uint8_t>(value ? 1 : 0)); }
  void text(const std::string& value, size_t limit) {
    const size_t size = std::min(value.size(), limit);
    number(static_cast<uint16_t>(size));
    const std::byte* begin = reinterpret_cast<const std::byte*>(value.data());
    bytes_.insert(bytes_.end(), begin, begin + size);
  }
  std::vector<std::byte>& bytes() { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  void number(T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (bytes_.size() - position_ < sizeof value) return fail("is too short");
    std::memcpy(&value, bytes_.data() + position_, sizeof value);
    position_ += sizeof value;
  }
  template <typename T>
  void choice(T& value, uint8_t count) {
    uint8_t raw = 0;
    number(raw);
    if (raw >= count) return fail("has an unknown enumerator");
    value = static_cast<T>(raw);
  }
  void count(int64_t& value) {
    number(value);
    if (value < 0 || value > kMaxNumber) fail("has a number out of range");
  }
  void flag(bool& value) {
    uint8_t raw = 0;
    number(raw);
    if (raw > 1) return fail("has a flag that is neither 0 nor 1");
    value = raw == 1;
  }
  void text(std::string& value, size_t limit) {
    uint16_t size = 0;
    number(size);
    if (size > limit) return fail("has a text over its limit");
    if (bytes_.size() - position_ < size) return fail("is too short");
    value.assign(reinterpret_cast<const char*>(bytes_.data()) + position_, size);
    position_ += size;
  }
  void fail(const char* what) {
    if (error_ == nullptr) error_ = what;
    position_ = bytes_.size();
  }
  const char* finish() {
    if (position_ != bytes_.size()) fail("is too long");
    return error_;
  }

 private:
  std::span<const std::byte> bytes_;
  size_t position_ = 0;
  const char* error_ = nullptr;
};

// `M` is the message type, const for a Writer.
template <typename A, typename M>
void visit_handle(A& archive, M& handle) {
  archive.number(handle.request);
  archive.number(handle.nonce);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Hello*) {
  archive.text(m.engine_id, kMaxNameBytes);
  archive.text(m.fingerprint, kMaxNameBytes);
  archive.choice(m.role, 3);
  archive.count(m.idle_timeout_us);
  archive.choice(m.layout.kind, 2);
  archive.choice(m.layout.dtype, 8);
  archive.count(m.layout.num_layers);
  archive.count(m.layout.block_size);
  archive.count(m.layout.bytes_per_token);
  archive.count(m.layout.kv_heads);
  archive.count(m.layout.head_dim);
  archive.count(m.layout.latent_dim);
  archive.count(m.layout.rope_dim);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Refuse*) {
  archive.text(m.text, kMaxTextBytes);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Begin*) {
  visit_handle(archive, m.handle);
  archive.count(m.num_tokens);
  archive.count(m.first_token);
  archive.count(m.remaining_us);
  archive.number(m.prompt.bytes);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Accept*) {
  visit_handle(archive, m.handle);
  archive.count(m.first_token);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Pull*) {
  visit_handle(archive, m.handle);
  archive.count(m.num_tokens);
  archive.count(m.first_token);
  archive.count(m.remaining_us);
  archive.number(m.prompt.bytes);
}

template <typename A>
void visit_checksum(A& archive, const std::optional<uint64_t>& checksum) {
  archive.flag(checksum.has_value());
  if (checksum.has_value()) archive.number(*checksum);
}
template <typename A>
void visit_checksum(A& archive, std::optional<uint64_t>& checksum) {
  bool present = false;
  archive.flag(present);
  if (!present) return;
  checksum.emplace();
  archive.number(*checksum);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Data*) {
  visit_handle(archive, m.handle);
  archive.count(m.layer);
  archive.count(m.first_part);
  archive.count(m.num_parts);
  visit_checksum(archive, m.checksum);
}

template <typename A>
void visit_first_token(A& archive, const std::optional<FirstToken>& first) {
  archive.flag(first.has_value());
  if (!first.has_value()) return;
  CHECK_LE(first->top_logprobs.size(), kMaxTopLogprobs);
  archive.number(first->token);
  archive.number(first->logprob);
  archive.count(first->cached_tokens);
  archive.number(static_cast<uint16_t>(first->top_logprobs.size()));
  for (const auto& [token, logprob] : first->top_logprobs) {
    archive.number(token);
    archive.number(logprob);
  }
}
template <typename A>
void visit_first_token(A& archive, std::optional<FirstToken>& first) {
  bool present = false;
  archive.flag(present);
  if (!present) return;
  first.emplace();
  archive.number(first->token);
  archive.number(first->logprob);
  archive.count(first->cached_tokens);
  uint16_t size = 0;
  archive.number(size);
  if (size > kMaxTopLogprobs) return archive.fail("has too many logprobs");
  first->top_logprobs.resize(size);
  for (auto& [token, logprob] : first->top_logprobs) {
    archive.number(token);
    archive.number(logprob);
  }
}

template <typename A, typename M>
void visit(A& archive, M& m, const Commit*) {
  visit_handle(archive, m.handle);
  archive.count(m.num_tokens);
  archive.count(m.num_bytes);
  visit_first_token(archive, m.first_token);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Ack*) {
  visit_handle(archive, m.handle);
  archive.count(m.num_bytes);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Abort*) {
  visit_handle(archive, m.handle);
  archive.choice(m.to, 2);
  archive.text(m.text, kMaxTextBytes);
  archive.number(m.prompt.bytes);
}

template <typename A, typename M>
void visit(A& archive, M& m, const AbortAck*) {
  visit_handle(archive, m.handle);
  archive.choice(m.to, 2);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Heartbeat*) {
  visit_handle(archive, m.handle);
  archive.choice(m.to, 2);
}

template <typename A, typename M>
void visit(A& archive, M& m, const Fault*) {
  visit_handle(archive, m.handle);
  archive.choice(m.to, 2);
  archive.choice(m.code, kNumFaultCodes);
  archive.text(m.text, kMaxTextBytes);
}

// The type on the wire is the place in the variant, counted from 1.
template <size_t kIndex = 0>
Result<Message> decode_as(size_t index, std::span<const std::byte> body) {
  if constexpr (kIndex == std::variant_size_v<Message>) {
    return make_error(ErrorKind::kDataLoss, "transfer message of unknown type {}", index + 1);
  } else {
    if (index != kIndex) return decode_as<kIndex + 1>(index, body);
    using M = std::variant_alternative_t<kIndex, Message>;
    M message;
    Reader reader(body);
    visit(reader, message, static_cast<const M*>(nullptr));
    const char* error = reader.finish();
    if (error != nullptr) {
      return make_error(ErrorKind::kDataLoss, "transfer message '{}' of {} bytes {}", message_name(message),
                        body.size() + kPrefixBytes, error);
    }
    return Message(std::move(message));
  }
}

}  // namespace

const char* fault_code_name(FaultCode code) {
  switch (code) {
    case FaultCode::kUnknownHandle:
      return "unknown_handle";
    case FaultCode::kConsumed:
      return "consumed";
    case FaultCode::kExpired:
      return "expired";
    case FaultCode::kAborted:
      return "aborted";
    case FaultCode::kOutOfRange:
      return "out_of_range";
    case FaultCode::kWrongLength:
      return "wrong_length";
    case FaultCode::kOtherPrompt:
      return "other_prompt";
    case FaultCode::kChecksum:
      return "checksum";
    case FaultCode::kProtocol:
      return "protocol";
  }
  return "?";
}

const char* message_name(const Message& message) {
  static constexpr const char* kNames[] = {"hello",  "refuse", "begin", "accept",    "pull",      "data",
                                           "commit", "ack",    "abort", "abort_ack", "heartbeat", "fault"};
  static_assert(std::size(kNames) == std::variant_size_v<Message>);
  return kNames[message.index()];
}

std::vector<std::byte> encode(const Message& message) {
  Writer writer;
  writer.number(kMagic);
  writer.number(kWireVersion);
  writer.number(static_cast<uint8_t>(message.index() + 1));
  writer.number(uint32_t{0});
  std::visit([&](const auto& m) { visit(writer, m, &m); }, message);
  std::vector<std::byte> bytes = std::move(writer.bytes());
  const uint32_t length = static_cast<uint32_t>(bytes.size());
  std::memcpy(bytes.data() + 4, &length, sizeof length);
  return bytes;
}

Result<Message> decode(std::span<const std::byte> bytes) {
  if (bytes.size() < kPrefixBytes) {
    return make_error(ErrorKind::kDataLoss, "transfer message of {} bytes is too short", bytes.size());
  }
  uint16_t magic = 0;
  uint8_t version = 0;
  uint8_t type = 0;
  uint32_t length = 0;
  std::memcpy(&magic, bytes.data(), sizeof magic);
  std::memcpy(&version, bytes.data() + 2, sizeof version);
  std::memcpy(&type, bytes.data() + 3, sizeof type);
  std::memcpy(&length, bytes.data() + 4, sizeof length);
  if (magic != kMagic) return make_error(ErrorKind::kDataLoss, "not a transfer message: it begins with {:#06x}", magic);
  if (version != kWireVersion) {
    return make_error(ErrorKind::kUnsupported, "the peer speaks version {} of the transfer protocol, this worker {}",
                      version, kWireVersion);
  }
  if (length != bytes.size()) {
    return make_error(ErrorKind::kDataLoss, "transfer message of {} bytes says that it has {}", bytes.size(), length);
  }
  return decode_as(static_cast<size_t>(type) - 1, bytes.subspan(kPrefixBytes));
}

Error to_error(const Fault& fault, const std::string& peer) {
  ErrorKind kind = ErrorKind::kInternal;
  switch (fault.code) {
    case FaultCode::kUnknownHandle:
    case FaultCode::kConsumed:
    case FaultCode::kOutOfRange:
    case FaultCode::kWrongLength:
    case FaultCode::kOtherPrompt:
      kind = ErrorKind::kInvalidArgument;
      break;
    case FaultCode::kExpired:
    case FaultCode::kAborted:  // somebody else ended it; kAborted would say that this request's client has left
      kind = ErrorKind::kUnavailable;
      break;
    case FaultCode::kChecksum:
      kind = ErrorKind::kDataLoss;
      break;
    case FaultCode::kProtocol:
      kind = ErrorKind::kInternal;
      break;
  }
  Error error = make_error(kind, "{} refused transfer {}: {}", peer, fault.handle.short_name(), fault.text);
  if (kind == ErrorKind::kInvalidArgument) error.param = "kv_transfer_params";
  error.code = fmt::format("kv_transfer_{}", fault_code_name(fault.code));
  return error;
}

namespace {

// describe_token() leaves out dimensions whose product it gives.
std::string describe_layout(const model::KvLayout& layout) {
  if (layout.kind == model::KvKind::kMla) {
    return fmt::format("{} (latent {}, rope {})", layout.describe_token(), layout.latent_dim, layout.rope_dim);
  }
  return fmt::format("{} ({} kv heads of {})", layout.describe_token(), layout.kv_heads, layout.head_dim);
}

}  // namespace

Status check_compatible(const Hello& mine, const Hello& theirs) {
  if (mine.fingerprint != theirs.fingerprint) {
    return make_error(ErrorKind::kUnsupported, "different models: {} serves '{}', {} serves '{}'", mine.engine_id,
                      mine.fingerprint, theirs.engine_id, theirs.fingerprint);
  }
  if (theirs.layout.block_size < 1 || theirs.layout.block_size > kMaxBlockTokens) {
    return make_error(ErrorKind::kUnsupported, "{} has KV blocks of {} tokens; {} takes 1 … {}", theirs.engine_id,
                      theirs.layout.block_size, mine.engine_id, kMaxBlockTokens);
  }
  model::KvLayout as_mine = theirs.layout;
  as_mine.block_size = mine.layout.block_size;
  if (!(mine.layout == as_mine)) {
    return make_error(ErrorKind::kUnsupported, "different KV layouts: {} has {}, {} has {}", mine.engine_id,
                      describe_layout(mine.layout), theirs.engine_id, describe_layout(theirs.layout));
  }
  if (mine.role != KvRole::kBoth && mine.role == theirs.role) {
    return make_error(ErrorKind::kUnsupported, "kv_role of {} is {}, of {} is {}; one has to produce, one to consume",
                      mine.engine_id, kv_role_name(mine.role), theirs.engine_id, kv_role_name(theirs.role));
  }
  return {};
}

}  // namespace tandem::transfer
