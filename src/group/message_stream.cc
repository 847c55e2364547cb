#include "src/group/message_stream.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace tandem::group {
namespace {

constexpr size_t kPrefixBytes = 4;
constexpr size_t kReadBytes = 64 * 1024;
constexpr int kMostReads = 16;  // per advance(), so that a peer that floods does not starve the others

constexpr const char* kClosed = "its connection was closed";

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

uint32_t read_prefix(const char* bytes) {
  uint32_t length = 0;
  for (size_t i = 0; i < kPrefixBytes; ++i) length = length << 8 | static_cast<uint8_t>(bytes[i]);
  return length;
}

Error make_lost(const std::string& why) { return make_error(ErrorKind::kUnavailable, "{}", why); }

// A process that dies with unread bytes resets its connection instead of closing it.
Error make_socket_error() { return make_lost(errno == ECONNRESET || errno == EPIPE ? kClosed : std::strerror(errno)); }

}  // namespace

MessageStream::MessageStream(int socket, int64_t max_message_bytes)
    : socket_(socket), max_message_bytes_(max_message_bytes) {}

MessageStream::~MessageStream() { ::close(socket_); }

void MessageStream::send(const Message& message) {
  const std::string text = encode_message(message);
  CHECK_LE(std::ssize(text), kMaxCoordinatorMessageBytes);
  for (size_t i = 0; i < kPrefixBytes; ++i) {
    out_.push_back(static_cast<char>(text.size() >> (8 * (kPrefixBytes - 1 - i)) & 0xFF));
  }
  out_ += text;
  static_cast<void>(write_some());  // a fault shows at the next advance()
}

std::vector<Result<Message>> MessageStream::advance() {
  std::vector<Result<Message>> messages;
  Status status = write_some();
  // A peer that has said something and left: what it said comes first.
  const Status read = read_some();
  if (status.ok()) status = read;
  size_t position = 0;
  while (true) {
    const Result<bool> taken = take_one(position, messages);
    if (!taken.ok()) {
      messages.emplace_back(taken.error());
      return messages;
    }
    if (!*taken) break;
  }
  in_.erase(0, position);
  if (status.ok() && std::ssize(out_) - static_cast<int64_t>(written_) > kMaxQueuedBytes) {
    status = make_lost(fmt::format("it does not read: {} bytes wait for it", out_.size() - written_));
  }
  if (!status.ok()) messages.emplace_back(status.error());
  return messages;
}

Result<bool> MessageStream::take_one(size_t& position, std::vector<Result<Message>>& messages) {
  if (in_.size() - position < kPrefixBytes) return false;
  const uint32_t length = read_prefix(in_.data() + position);
  if (length == 0 || length > max_message_bytes_) {
    return make_lost(fmt::format("not a message of this protocol: its length is {}, at most {} are taken", length,
                                 max_message_bytes_));
  }
  if (in_.size() - position - kPrefixBytes < length) return false;
  Result<Message> message = decode_message(std::string_view(in_).substr(position + kPrefixBytes, length));
  if (!message.ok()) return std::move(message).error();
  messages.push_back(std::move(message));
  position += kPrefixBytes + length;
  return true;
}

Status MessageStream::write_some() {
  while (wants_write()) {
    const ssize_t count = ::send(socket_, out_.data() + written_, out_.size() - written_, MSG_NOSIGNAL);
    if (count < 0) {
      if (would_block() || errno == ENOTCONN) return {};
      return make_socket_error();
    }
    written_ += static_cast<size_t>(count);
    if (written_ >= static_cast<size_t>(kMaxCoordinatorMessageBytes)) {
      out_.erase(0, written_);
      written_ = 0;
    }
  }
  out_.clear();
  written_ = 0;
  return {};
}

Status MessageStream::read_some() {
  std::array<char, kReadBytes> buffer;  // NOLINT: filled by recv
  for (int i = 0; i < kMostReads; ++i) {
    const ssize_t count = ::recv(socket_, buffer.data(), buffer.size(), 0);
    if (count < 0) {
      if (would_block() || errno == ENOTCONN) return {};
      return make_socket_error();
    }
    if (count == 0) return make_lost(kClosed);
    in_.append(buffer.data(), static_cast<size_t>(count));
  }
  return {};
}

}  // namespace tandem::group
