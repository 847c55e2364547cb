#include "src/comm/stream.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace tandem::comm {
namespace {

constexpr size_t kMaxIovecs = 512;  // per call; the kernel takes 1024
constexpr int kMaxWrites = 8;       // calls per turn, so that no stream starves the others
constexpr std::array<std::byte, static_cast<size_t>(kMaxStreamPayloadBytes)> kZeros{};
constexpr size_t kTailBytes = 256;              // read behind a payload: its mark and, as a rule, the next header
constexpr size_t kMostAwaited = 128 * 1024;  // so that reading begins while the rest arrives

Error make_socket_error(const char* what) {
  return make_error(ErrorKind::kUnavailable, "{}: {}", what, std::strerror(errno));
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ENOTCONN; }

// Appends what is left of `bytes` behind the first `skip`, which it counts down.
void append(std::vector<iovec>& list, ByteSpan bytes, size_t& skip) {
  const size_t skipped = std::min(skip, bytes.size());
  skip -= skipped;
  if (skipped == bytes.size()) return;
  list.push_back({const_cast<std::byte*>(bytes.data()) + skipped, bytes.size() - skipped});
}

}  // namespace

Stream::Stream(int socket) : socket_(socket) {}

Stream::~Stream() { close(socket_); }

void Stream::add(std::unique_ptr<OutFrame> frame) {
  unwritten_bytes_ += frame->bytes();
  queue_.push_back(std::move(frame));
}

void Stream::add_raw(std::span<const std::byte> bytes) {
  std::unique_ptr<OutFrame> frame = std::make_unique<OutFrame>();
  frame->head.assign(bytes.begin(), bytes.end());
  add(std::move(frame));
}

Status Stream::write_some(std::vector<std::unique_ptr<OutFrame>>& done) {
  std::vector<iovec> list;
  for (int turn = 0; turn < kMaxWrites && !queue_.empty(); ++turn) {
    list.clear();
    size_t skip = written_;
    for (const std::unique_ptr<OutFrame>& frame : queue_) {
      if (list.size() + frame->payload.size() + 2 > kMaxIovecs && !list.empty()) break;
      append(list, frame->head, skip);
      for (const ByteSpan piece : frame->payload) append(list, piece, skip);
      if (frame->payload_bytes > 0) append(list, std::as_bytes(std::span(&frame->mark, 1)), skip);
    }
    msghdr message{};
    message.msg_iov = list.data();
    message.msg_iovlen = std::min<size_t>(list.size(), 1024);
    const ssize_t count = sendmsg(socket_, &message, MSG_NOSIGNAL);
    if (count < 0) {
      if (would_block()) return {};
      return make_socket_error("send");
    }
    written_ += static_cast<size_t>(count);
    unwritten_bytes_ -= static_cast<size_t>(count);
    while (!queue_.empty() && written_ >= queue_.front()->bytes()) {
      written_ -= queue_.front()->bytes();
      done.push_back(std::move(queue_.front()));
      queue_.pop_front();
    }
  }
  return {};
}

bool Stream::revoke(uint64_t token) {
  for (size_t i = 0; i < queue_.size(); ++i) {
    OutFrame& frame = *queue_[i];
    if (!frame.wants_sent || frame.token != token) continue;
    frame.wants_sent = false;
    if (i == 0 && written_ >= frame.head.size() + frame.payload_bytes) return true;  // the kernel has all of it
    if (i == 0 && written_ > 0) {  // on its way: the receiver counts on as many bytes as the header says
      frame.payload.assign(1, ByteSpan(kZeros).first(frame.payload_bytes));
      frame.mark = PayloadMark::kVoid;
      return true;
    }
    unwritten_bytes_ -= frame.bytes();
    FrameHeader header;
    std::memcpy(&header, frame.head.data(), sizeof header);
    header.payload_bytes = 0;
    header.is_void = 1;
    std::memcpy(frame.head.data(), &header, sizeof header);
    frame.payload.clear();
    frame.payload_bytes = 0;
    unwritten_bytes_ += frame.bytes();
    return true;
  }
  return false;
}

std::vector<std::unique_ptr<OutFrame>> Stream::take_queue() {
  std::vector<std::unique_ptr<OutFrame>> list;
  for (std::unique_ptr<OutFrame>& frame : queue_) list.push_back(std::move(frame));
  queue_.clear();
  return list;
}

bool Stream::is_delivered() const {
  int unsent = 0;
  return ioctl(socket_, SIOCOUTQ, &unsent) != 0 || unsent == 0;
}

Result<size_t> Stream::count_read(ssize_t count) {
  if (count < 0) {
    if (would_block()) return size_t{0};
    return make_socket_error("receive");
  }
  if (count == 0) return make_error(ErrorKind::kUnavailable, "closed by the peer");
  num_read_ += static_cast<uint64_t>(count);
  return static_cast<size_t>(count);
}

Result<bool> Stream::read_some(size_t most_bytes) {
  if (!wants_read()) return false;
  if (buffer_ == nullptr) buffer_.reset(new std::byte[kBufferBytes]);
  if (begin_ == end_) begin_ = end_ = 0;
  // Room for the rest of a frame that has begun; what is moved is less than a frame.
  if (kBufferBytes - end_ < static_cast<size_t>(kMaxFrameBytes)) {
    std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  const size_t room = std::min(most_bytes, kBufferBytes - end_);
  TANDEM_ASSIGN(const size_t count, count_read(recv(socket_, buffer_.get() + end_, room, 0)));
  end_ += count;
  return count == room;
}

Result<bool> Stream::read_payload(const FrameHeader& header, std::span<const MutableByteSpan> place) {
  MutableByteSpan nowhere;
  if (place.empty()) {
    has_lost_ = true;
    if (nowhere_ == nullptr) nowhere_.reset(new std::byte[static_cast<size_t>(kMaxStreamPayloadBytes)]);
    nowhere = {nowhere_.get(), header.payload_bytes};
    place = std::span(&nowhere, 1);
  }
  const size_t ahead = sizeof header + header.body_bytes;
  CHECK_GE(unread_bytes(), ahead);
  ByteSpan early;  // bytes of the payload that are in the buffer
  if (!is_placing_) {
    if (begin_ > kBufferBytes / 2) {  // room for what follows
      std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    is_placing_ = true;
    placed_bytes_ = 0;
    early = unread().subspan(ahead);
    CHECK_LT(early.size(), header.payload_bytes);
    end_ = begin_ + ahead;
  }
  CHECK_LE(end_ + kTailBytes, kBufferBytes);
  std::array<iovec, kMaxIovecs> list;
  size_t num_pieces = 0;
  size_t skip = placed_bytes_;
  size_t room = 0;
  for (MutableByteSpan piece : place) {
    const size_t skipped = std::min(skip, piece.size());
    skip -= skipped;
    piece = piece.subspan(skipped);
    const size_t known = std::min(early.size(), piece.size());
    std::copy_n(early.begin(), known, piece.begin());
    early = early.subspan(known);
    placed_bytes_ += known;
    piece = piece.subspan(known);
    if (piece.empty()) continue;
    list[num_pieces++] = {piece.data(), piece.size()};
    room += piece.size();
    if (num_pieces == kMaxIovecs - 1) break;
  }
  CHECK_EQ(early.size(), 0U);
  const size_t in_place = room;
  if (placed_bytes_ + room == header.payload_bytes) {
    list[num_pieces++] = {buffer_.get() + end_, kTailBytes};
    room += kTailBytes;
  }
  msghdr message{};
  message.msg_iov = list.data();
  message.msg_iovlen = num_pieces;
  TANDEM_ASSIGN(const size_t count, count_read(recvmsg(socket_, &message, 0)));
  const size_t placed = std::min(count, in_place);
  placed_bytes_ += placed;
  end_ += count - placed;
  return count == room;
}

size_t Stream::buffered_bytes(const FrameHeader& header) const {
  return is_placing_ ? sizeof header + header.body_bytes + sizeof(PayloadMark) : frame_bytes(header);
}

// Of the frame that has begun; 1 if nothing is known of it.
size_t Stream::missing_bytes() const {
  FrameHeader header;
  if (unread_bytes() < sizeof header) return 1;
  std::memcpy(&header, buffer_.get() + begin_, sizeof header);
  if (!check_header(header).ok()) return 1;
  const size_t all = buffered_bytes(header) + (is_placing_ ? header.payload_bytes - placed_bytes_ : 0);
  return all > unread_bytes() ? all - unread_bytes() : 1;
}

void Stream::await_whole_frame() {
  const int missing = static_cast<int>(std::min(missing_bytes(), kMostAwaited));
  if (missing == awaited_bytes_) return;
  awaited_bytes_ = missing;
  setsockopt(socket_, SOL_SOCKET, SO_RCVLOWAT, &missing, sizeof missing);
}

void Stream::consume(size_t bytes) {
  CHECK_LE(bytes, end_ - begin_);
  begin_ += bytes;
}

void Stream::consume_frame(const FrameHeader& header) {
  consume(buffered_bytes(header));
  is_placing_ = has_lost_ = false;
}

Result<std::optional<FrameHeader>> Stream::first_header() const {
  FrameHeader header;
  const std::span<const std::byte> bytes = unread();
  if (bytes.size() < sizeof header) return std::optional<FrameHeader>();
  std::memcpy(&header, bytes.data(), sizeof header);
  TANDEM_TRY(check_header(header));
  if (bytes.size() < sizeof header + header.body_bytes) return std::optional<FrameHeader>();
  return std::optional<FrameHeader>(header);
}

Result<std::optional<FrameHeader>> Stream::next_frame() const {
  TANDEM_ASSIGN(const std::optional<FrameHeader> header, first_header());
  if (!header.has_value() || unread_bytes() < buffered_bytes(*header)) return std::optional<FrameHeader>();
  if (is_placing_ && placed_bytes_ < header->payload_bytes) return std::optional<FrameHeader>();
  return header;
}

}  // namespace tandem::comm
