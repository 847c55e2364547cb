// One TCP socket that carries frames: those to be written wait in a queue, what was read waits in a buffer. No frame is
// copied on its way out: the kernel reads header and payload where they lie. On its way in a payload may go past the
// buffer, to the place that the owner names for each read.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "src/comm/frame.h"

namespace tandem::comm {

struct OutFrame {
  std::vector<std::byte> head;    // header and body
  std::vector<ByteSpan> payload;  // the caller's memory
  size_t payload_bytes = 0;
  PayloadMark mark = PayloadMark::kWhole;
  uint64_t token = 0;      // 0: nobody wants to know
  bool wants_sent = false;  // the caller waits for the end of the payload

  size_t bytes() const { return head.size() + payload_bytes + (payload_bytes > 0 ? sizeof mark : 0); }
};

class Stream {
 public:
  explicit Stream(int socket);  // connected or connecting, non-blocking; takes it
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int socket() const { return socket_; }

  // --- out ---
  void add(std::unique_ptr<OutFrame> frame);
  // Bytes that no frame frames, before every frame that is added later.
  void add_raw(std::span<const std::byte> bytes);
  // Writes what the kernel takes now. Frames that are written go to `done`.
  Status write_some(std::vector<std::unique_ptr<OutFrame>>& done);
  bool wants_write() const { return !queue_.empty(); }
  int64_t num_queued() const { return std::ssize(queue_); }
  size_t unwritten_bytes() const { return unwritten_bytes_; }
  // Takes back the payload of the frame with `token`: when this returns it is not read any more. What the receiver was
  // promised is replaced by zeros and a mark that says so. False if no such frame waits.
  bool revoke(uint64_t token);
  std::vector<std::unique_ptr<OutFrame>> take_queue();
  // True if the peer's kernel has everything that was written.
  bool is_delivered() const;

  // --- in ---
  // Reads once, at most `most_bytes`, if wants_read(); true if there may be more. An error at the end of the stream comes
  // only after all that was sent has been read.
  Result<bool> read_some(size_t most_bytes = kBufferBytes);
  // The header of the first frame, if header and body are there.
  Result<std::optional<FrameHeader>> first_header() const;
  // Reads once: the payload of the first frame, of which first_header() has told, to `place`, from where the last such
  // read of it ended; and a little of what follows. Bytes of it that were in the buffer go there, too. Afterwards the
  // buffer holds the frame without its payload. Without a place the bytes are lost, and with them the whole payload.
  Result<bool> read_payload(const FrameHeader& header, std::span<const MutableByteSpan> place);
  // Some of the first frame's payload has gone past the buffer; all that was read of it has a place.
  bool is_placing() const { return is_placing_; }
  bool is_placed() const { return is_placing_ && !has_lost_; }
  // Bytes read so far.
  uint64_t num_read() const { return num_read_; }
  // How many bytes of the first frame, payloads that went elsewhere apart, lie in the buffer when it is complete.
  size_t buffered_bytes(const FrameHeader& header) const;
  // Lets the kernel wake us only when much of the frame that has begun to arrive is there.
  void await_whole_frame();
  // Less than a whole frame waits to be consumed.
  bool wants_read() const { return end_ - begin_ < static_cast<size_t>(kMaxFrameBytes); }
  size_t unread_bytes() const { return end_ - begin_; }
  // The bytes read and not yet consumed.
  std::span<const std::byte> unread() const { return {buffer_.get() + begin_, end_ - begin_}; }
  void consume(size_t bytes);
  // The first frame goes.
  void consume_frame(const FrameHeader& header);
  // The header of the next frame, if the whole frame is there.
  Result<std::optional<FrameHeader>> next_frame() const;

  uint32_t interest = 0;  // the events that its owner waits for

  static constexpr size_t kBufferBytes = 576 * 1024;
  static_assert(static_cast<int64_t>(kBufferBytes) >= 2 * kMaxFrameBytes);

 private:
  size_t missing_bytes() const;
  Result<size_t> count_read(ssize_t count);

  int socket_;
  std::deque<std::unique_ptr<OutFrame>> queue_;
  size_t written_ = 0;  // of the first frame
  size_t unwritten_bytes_ = 0;
  std::unique_ptr<std::byte[]> buffer_;  // from the first read on
  size_t begin_ = 0;
  size_t end_ = 0;
  int awaited_bytes_ = 1;
  bool is_placing_ = false;
  bool has_lost_ = false;      // some of the payload had no place
  size_t placed_bytes_ = 0;    // of the payload of the first frame
  std::unique_ptr<std::byte[]> nowhere_;  // for payloads whose place has gone
  uint64_t num_read_ = 0;
};

}  // namespace tandem::comm
