// Messages between processes: small control messages and payloads of up to kMaxPayloadBytes, over named connections.
//
// Two-sided on purpose. The receiver is shown a view of a payload, in transport memory or, within a host, where it lies
// in the sender's memory; where the bytes go is the receiver's decision after it has read the message. No address of the
// receiver's memory is known to the sender, so a late, repeated or stray message can be dropped but can never land.
//
// Threading: every method but wake() belongs to one thread, and the handler is called on it, only from poll().
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/comm/transport.h"

namespace tandem::comm {

// One connection of one messenger; never reused while the process lives.
using ConnectionId = StrongId<struct ConnectionIdTag, uint64_t>;

// A payload and its message fit into one 64 KiB shared-memory segment: no reassembly, no allocation by the transport.
inline constexpr int64_t kMaxPayloadBytes = 63 * 1024;
inline constexpr int64_t kMaxMessageBytes = 16 * 1024;   // a message without payload
inline constexpr int64_t kMaxHeaderBytes = 512;          // a message that has a payload
inline constexpr int64_t kMaxConnections = 256;          // opened and accepted together
inline constexpr int64_t kMaxSendsPerConnection = 4096;  // not yet finished by the transport
inline constexpr int64_t kMaxPieces = 1024;              // of one payload

using ByteSpan = std::span<const std::byte>;
using MutableByteSpan = std::span<std::byte>;

// A payload that lies in the memory of another process, which may take it back at any moment: whoever uses it copies it
// first and then asks is_valid(). Only if that is true, all that was copied is what was sent.
class BorrowedPayload {
 public:
  // The pieces count while `*word` is `ticket`.
  BorrowedPayload(std::span<const ByteSpan> pieces, const std::atomic<uint64_t>* word, uint64_t ticket)
      : pieces_(pieces), word_(word), ticket_(ticket) {}

  std::span<const ByteSpan> pieces() const { return pieces_; }
  int64_t bytes() const;
  bool is_valid() const {
    // The copy's loads stay before the load of the word; the owner changes the word before it writes the bytes.
    std::atomic_thread_fence(std::memory_order_acquire);
    return word_->load(std::memory_order_relaxed) == ticket_;
  }

 private:
  std::span<const ByteSpan> pieces_;
  const std::atomic<uint64_t>* word_;
  uint64_t ticket_;
};

class MessageHandler {
 public:
  virtual ~MessageHandler() = default;
  virtual void on_accept(ConnectionId connection) = 0;
  // The views end with the call. `payload` is empty for a message sent without one.
  virtual void on_message(ConnectionId connection, std::span<const std::byte> message,
                          std::span<const std::byte> payload) = 0;
  // As on_message, for a payload in the peer's memory. By default the handler is shown a copy, if that could be made.
  virtual void on_borrowed_message(ConnectionId connection, std::span<const std::byte> message,
                                   const BorrowedPayload& payload);
  // Asked before each read of a payload that is only partly here: where its bytes shall go. True with pieces of together
  // `payload_bytes` bytes, which are written before this call's caller does anything else and not later. False: the
  // payload is shown with on_message when it is whole; or, if there was a place for its first bytes, nobody gets it.
  virtual bool find_place(ConnectionId connection, std::span<const std::byte> message, int64_t payload_bytes,
                          std::vector<MutableByteSpan>& pieces) {
    (void)connection, (void)message, (void)payload_bytes, (void)pieces;
    return false;
  }
  // As on_message, for a payload all of whose bytes went where find_place said, the last time just before.
  virtual void on_placed_message(ConnectionId connection, std::span<const std::byte> message, int64_t payload_bytes) {
    (void)connection, (void)message, (void)payload_bytes;
  }
  // The payload sent with `token` is no longer read by the transport. Says nothing about its arrival.
  virtual void on_sent(ConnectionId connection, uint64_t token) = 0;
  // The peer is gone or could not be reached. Follows the last on_sent of the connection; the id is dead.
  // Not called after close().
  virtual void on_closed(ConnectionId connection, const Error& why) = 0;
};

enum class SendResult : uint8_t {
  kSent,     // the payload may be reused now; no on_sent follows
  kPending,  // the payload must stay until on_sent(token)
  kClosed,   // the connection is closing or unknown; nothing was sent, no on_sent follows
};

class Messenger {
 public:
  virtual ~Messenger() = default;

  // The port in use.
  virtual int64_t port() const = 0;
  // Starts connecting; messages may be sent at once and wait. The outcome is a message from the peer, or on_closed.
  virtual Result<ConnectionId> connect(const std::string& host, int64_t port) = 0;
  // The largest payload; the same on both sides of a connection.
  virtual int64_t max_payload_bytes() const { return kMaxPayloadBytes; }
  // Messages of one connection arrive in order.
  virtual SendResult send(ConnectionId connection, std::span<const std::byte> message,
                          std::span<const std::byte> payload = {}, uint64_t token = 0) = 0;
  // Whether send_pieces() and revoke() may be used on this connection.
  virtual bool takes_pieces(ConnectionId connection) const {
    (void)connection;
    return false;
  }
  // As send(), for a payload of up to kMaxPieces pieces that the transport reads where they lie.
  virtual SendResult send_pieces(ConnectionId connection, std::span<const std::byte> message,
                                 std::span<const ByteSpan> pieces, uint64_t token);
  // Takes the pieces of a pending send back: when this returns they may be overwritten, however far the transport or
  // the peer had come; the peer does not get the message, or is_valid() of its payload is false. No on_sent follows.
  // Nothing happens if the send has ended. Also for connections that are being closed.
  virtual void revoke(ConnectionId connection, uint64_t token);
  // False if payloads do not leave the memory of this host, so that a checksum of them would guard nothing.
  virtual bool wants_checksum(ConnectionId connection) const {
    (void)connection;
    return true;
  }
  // Drops the connection at once, with whatever is still queued. on_sent still follows for pending payloads.
  virtual void close(ConnectionId connection) = 0;
  // "shared memory", "tcp/eth0 x4", "ucx posix/memory"; "connecting" before that is known.
  virtual std::string transport_name(ConnectionId connection) const = 0;

  // Handles what has arrived, then sleeps in the kernel until something arrives, wake() is called or `timeout_us` is
  // over.
  virtual void poll(int64_t timeout_us) = 0;
  // Ends the current or the next sleep of poll(). From any thread.
  virtual void wake() = 0;
};

// Memory of this process from which payloads may be sent without a copy within the host: a memfd that others may open.
struct LocalMemory {
  std::byte* base = nullptr;
  int64_t bytes = 0;
  int fd = -1;  // -1: not shareable
};

struct MessengerOptions {
  std::string listen_host = "127.0.0.1";  // an address of this machine that peers can reach; no wildcard
  int64_t listen_port = 0;                // 0: any free port
  Transport transport = Transport::kAuto;
  LocalMemory memory;  // must outlive the messenger
};

// `handler` must outlive the messenger. Both ends of a connection must use the same family: UCX, or the others.
Result<std::unique_ptr<Messenger>> make_messenger(const MessengerOptions& options, MessageHandler& handler);
// The two that make_messenger chooses from.
Result<std::unique_ptr<Messenger>> make_ucx_messenger(const MessengerOptions& options, MessageHandler& handler);
Result<std::unique_ptr<Messenger>> make_stream_messenger(const MessengerOptions& options, MessageHandler& handler);

}  // namespace tandem::comm
