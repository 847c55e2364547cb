// One connection between a rank and the coordinator: messages behind their length (4 bytes, big-endian) over a
// non-blocking socket.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/group/messages.h"

namespace tandem::group {

inline constexpr int64_t kMaxRankMessageBytes = 512 * 1024;               // from a rank, or from a stranger
inline constexpr int64_t kMaxCoordinatorMessageBytes = 8 * 1024 * 1024;   // kMaxRanks windows
inline constexpr int64_t kMaxQueuedBytes = 2 * kMaxCoordinatorMessageBytes;

class MessageStream {
 public:
  // Takes the connected or connecting, non-blocking socket.
  MessageStream(int socket, int64_t max_message_bytes);
  ~MessageStream();
  MessageStream(const MessageStream&) = delete;
  MessageStream& operator=(const MessageStream&) = delete;

  int socket() const { return socket_; }
  // Queues it, and writes what is possible now.
  void send(const Message& message);
  bool wants_write() const { return written_ < out_.size(); }
  // Writes and reads what is possible now, and returns what has arrived, in order. The last element may be an error:
  // the peer is gone, does not read, or speaks something else; the connection is of no more use then.
  std::vector<Result<Message>> advance();

 private:
  Status write_some();
  Status read_some();
  Result<bool> take_one(size_t& position, std::vector<Result<Message>>& messages);

  int socket_;
  int64_t max_message_bytes_;
  std::string out_;
  size_t written_ = 0;
  std::string in_;
};

}  // namespace tandem::group
