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
constexpr std::array<std::byte, static_cast<size_t>(kMaxPayloadBytes)> kZeros{};

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

Result<bool> Stream::read_some() {
  if (!wants_read()) return false;
  if (buffer_ == nullptr) buffer_.reset(new std::byte[kBufferBytes]);
  if (begin_ == end_) begin_ = end_ = 0;
  // Room for the rest of a frame that has begun; what is moved is less than a frame.
  if (kBufferBytes - end_ < static_cast<size_t>(kMaxFrameBytes)) {
    std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  const size_t room = kBufferBytes - end_;
  const ssize_t count = recv(socket_, buffer_.get() + end_, room, 0);
  if (count < 0) {
    if (would_block()) return false;
    return make_socket_error("receive");
  }
  if (count == 0) return make_error(ErrorKind::kUnavailable, "closed by the peer");
  end_ += static_cast<size_t>(count);
  return static_cast<size_t>(count) == room;
}

void Stream::await_whole_frame() {
  FrameHeader header;
  int missing = 1;
  if (unread_bytes() >= sizeof header) {
    std::memcpy(&header, buffer_.get() + begin_, sizeof header);
    const size_t size = check_header(header).ok() ? frame_bytes(header) : 0;
    if (size > unread_bytes()) missing = static_cast<int>(size - unread_bytes());
  }
  if (missing == awaited_bytes_) return;
  awaited_bytes_ = missing;
  setsockopt(socket_, SOL_SOCKET, SO_RCVLOWAT, &missing, sizeof missing);
}

void Stream::consume(size_t bytes) {
  CHECK_LE(bytes, end_ - begin_);
  begin_ += bytes;
}

Result<std::optional<FrameHeader>> Stream::next_frame() const {
  FrameHeader header;
  const std::span<const std::byte> bytes = unread();
  if (bytes.size() < sizeof header) return std::optional<FrameHeader>();
  std::memcpy(&header, bytes.data(), sizeof header);
  TANDEM_TRY(check_header(header));
  if (bytes.size() < frame_bytes(header)) return std::optional<FrameHeader>();
  return std::optional<FrameHeader>(header);
}

}  // namespace tandem::comm
