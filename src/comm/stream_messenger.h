// Messenger over plain TCP streams and, within a host, over memory that the peer may read.
//
//  - A connection is one TCP stream to a peer that shares memory with us, several to any other: one stream does not fill
//    a line with a delay, and on a host several are read and written at a time. Frames are numbered and delivered in
//    order, whatever stream brought them.
//  - Payloads are never copied here on their way out. Over TCP the kernel reads them where they lie; a payload that is
//    taken back in the middle is filled up with zeros and marked. Within a host only its place travels: the receiver reads
//    it in the sender's memory and says when it is done; one that is taken back is marked in its ticket (tickets.h).
//  - Over TCP the receiver reads headers ahead, and payloads when their turn has come: then the handler says for each read
//    where the bytes go, and the kernel writes them there. Nothing is remembered from one read to the next.
//  - A lost peer is noticed by its sockets: the kernel closes them when a process dies.
//  - 20 us after the last event the thread sleeps in the kernel; 60 us in the middle of much traffic, because a core that
//    sleeps has to be woken by the sender.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/address.h"
#include "src/comm/frame.h"
#include "src/comm/look_ups.h"
#include "src/comm/messenger.h"
#include "src/comm/peer_memory.h"
#include "src/comm/stream.h"
#include "src/comm/tickets.h"

namespace tandem::comm {

inline constexpr size_t kStreams = 4;      // of a connection over TCP
inline constexpr int64_t kMaxGuests = 64;  // accepted sockets that have not said what they are for

class StreamMessenger final : public Messenger {
 public:
  explicit StreamMessenger(MessageHandler& handler) : handler_(handler) {}
  ~StreamMessenger() override;

  Status start(const MessengerOptions& options);

  int64_t port() const override { return port_; }
  Result<ConnectionId> connect(const std::string& host, int64_t port) override;
  SendResult send(ConnectionId connection, std::span<const std::byte> message, std::span<const std::byte> payload,
                  uint64_t token) override;
  int64_t max_payload_bytes() const override { return kMaxStreamPayloadBytes; }
  bool takes_pieces(ConnectionId) const override { return true; }
  SendResult send_pieces(ConnectionId connection, std::span<const std::byte> message, std::span<const ByteSpan> pieces,
                         uint64_t token) override;
  void revoke(ConnectionId connection, uint64_t token) override;
  bool wants_checksum(ConnectionId connection) const override;
  void close(ConnectionId connection) override;
  std::string transport_name(ConnectionId connection) const override;
  void poll(int64_t timeout_us) override;
  void wake() override;

 private:
  // A send from before the greetings were exchanged.
  struct Waiting {
    std::vector<std::byte> message;
    std::vector<ByteSpan> pieces;
    uint64_t token = 0;
  };
  // A payload that the peer may read; in the order of sending.
  struct Lent {
    Ticket ticket;
    uint64_t token = 0;
    bool is_over = false;  // taken back
  };
  struct Link {
    ConnectionId id;
    std::string peer;  // for messages: "127.0.0.1:9000"
    SocketAddress address;
    bool opened_here = false;
    bool is_open = false;  // the greetings are exchanged
    int64_t deadline_us = 0;  // until then
    std::vector<std::unique_ptr<Stream>> streams;
    std::string key;
    Transport peer_transport = Transport::kAuto;
    std::optional<PeerMemory> peer_memory;  // we can read theirs
    bool is_read = false;                   // they can read ours
    std::string no_sharing;                 // why not
    std::deque<Waiting> waiting;
    size_t current = 0;    // the stream that carries the present run of frames
    size_t run_bytes = 0;  // of it
    uint64_t next_out = 1;
    uint64_t next_in = 1;
    std::deque<Lent> lent;
    uint64_t num_lent_read = 0;
    uint64_t num_borrowed = 0;
    uint64_t num_borrowed_told = 0;
    bool closed_by_us = false;
    std::optional<Error> failure;

    bool is_dead() const { return closed_by_us || failure.has_value(); }
    bool shares() const { return peer_memory.has_value() && is_read; }
    int64_t num_unfinished() const;
  };
  struct Guest {
    std::unique_ptr<Stream> stream;
    std::string peer;
    int64_t deadline_us = 0;
  };
  enum EventKind : uint64_t { kWakeEvent = 0, kListenerEvent = 1, kStreamEvent = 2, kGuestEvent = 3 };

  Link* find(ConnectionId id);
  const Link* find(ConnectionId id) const;
  Link& add_link(std::string peer);
  Stream& add_stream(Link& link, std::unique_ptr<Stream> stream);
  void watch(int operation, int fd, EventKind kind, uint64_t id, size_t stream, uint32_t events);

  // stream_meeting.cc
  void open_new();
  void open_to(ConnectionId id, const SocketAddress& address);
  void accept_all();
  void read_guest(uint64_t id);
  void welcome(uint64_t guest_id, const Greeting& greeting);
  void read_greeting(Link& link);
  Greeting make_greeting(GreetingKind kind) const;
  void map_memory(Link& link, const Greeting& greeting);
  void open_link(Link& link);
  void end_late();

  // stream_messenger.cc
  SendResult enqueue(Link& link, std::span<const std::byte> message, std::span<const ByteSpan> pieces, uint64_t token);
  void hand_over(Link& link, std::unique_ptr<OutFrame> frame);
  size_t choose_stream(Link& link);
  bool is_in_memory(std::span<const ByteSpan> pieces) const;
  std::unique_ptr<OutFrame> take_blank();
  void read_stream(Link& link, Stream& stream);
  Result<bool> read_once(Link& link, Stream& stream);
  static bool may_read(const Link& link, const Stream& stream);
  static Stream* find_stream_in_turn(Link& link);
  void read_last_words(Link& link);
  void deliver(Link& link);
  void take_frame(Link& link, const FrameHeader& header, const Stream& stream);
  void take_borrowed(Link& link, const FrameHeader& header, std::span<const std::byte> body);
  void take_read(Link& link, uint64_t count);
  void tell_read(Link& link);
  void fail(Link& link, Error error);
  Status write_stream(Link& link, Stream& stream);
  void flush_link(Link& link);
  bool flush_all();
  void update_interest(Link& link);
  bool sweep();
  void finish(std::unique_ptr<Link> link);
  bool is_flushed() const;
  int handle_events(int64_t timeout_us);

  MessageHandler& handler_;
  MessengerOptions options_;
  std::string device_;
  std::string boot_id_;
  std::optional<TicketTable> tickets_;  // if our memory may be read
  int listener_ = -1;
  int64_t port_ = 0;
  int epoll_fd_ = -1;
  int wake_fd_ = -1;
  std::atomic<bool> wake_pending_{false};
  bool stopping_ = false;  // messages are not delivered any more
  uint64_t next_id_ = 1;
  std::map<ConnectionId, std::unique_ptr<Link>> links_;
  std::map<uint64_t, Guest> guests_;
  std::vector<std::pair<ConnectionId, SocketAddress>> to_open_;  // connect() was called
  std::unique_ptr<LookUps> look_ups_;
  std::vector<std::unique_ptr<OutFrame>> blanks_;
  std::deque<std::pair<ConnectionId, uint64_t>> sent_;   // to be reported
  std::vector<std::unique_ptr<OutFrame>> written_;       // scratch
  std::vector<ByteSpan> borrowed_pieces_;                // scratch
  std::vector<MutableByteSpan> place_;                   // scratch, of one read
  SteadyClock clock_;
  int64_t last_event_us_ = 0;
  int64_t moved_bytes_ = 0;  // of payloads, since the last sleep
};

}  // namespace tandem::comm
