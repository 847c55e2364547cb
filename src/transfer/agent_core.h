// The agent without thread, socket and clock: tables of transfers and links, and the dispatch between engine commands,
// messages and state machines. agent.cc runs it on a thread over a real messenger; tests run it over a made-up network.
//
// Ownership of blocks: the only place that writes KV memory is write_payload(), called while the transfer is in the table,
// and the messenger, in the one read before which find_place() has looked the transfer up. It is read by stage(), in the
// same way, and by a messenger that takes pieces: from send_part() until the part is sent or end_transfer() has taken it
// back. A transfer leaves the table in the same step in which its Done is emitted. Hence nothing is written after Done,
// whatever the peer or the transport does, and nothing that is read after it counts anywhere.
//
// Blocks of the two sides may differ in size. What travels are the sender's; the receiver finds the places (block_map.h).
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/messenger.h"
#include "src/transfer/agent.h"
#include "src/transfer/block_map.h"
#include "src/transfer/receive_machine.h"
#include "src/transfer/send_machine.h"

namespace tandem::transfer {

inline constexpr int64_t kMaxTransfers = 8192;            // open at a time, publications included
inline constexpr int64_t kMaxRetired = 16384;             // ended handles whose fate is remembered for error messages
inline constexpr int64_t kMaxStaged = 256;                // payloads in flight that need a buffer …
inline constexpr int64_t kStagedBytes = comm::kMaxPayloadBytes;  // … of this size
inline constexpr int64_t kMaxLent = 1024;                 // payloads in flight that lie in our blocks
inline constexpr int64_t kMaxDataPerPump = 64;            // messages between two looks at commands and arrivals
inline constexpr int64_t kMaxMessagesBeforeHello = 4096;  // waiting for a link to stand
inline constexpr int64_t kLingerUs = 1'000'000;           // for a refusal to reach the peer
inline constexpr int64_t kIdleLinkUs = 300'000'000;       // a link that we opened and that serves no transfer

// The KV cache as the agent sees it: block b of layer l begins at base + l * layer_stride_bytes + b * block bytes.
struct KvMemory {
  std::byte* base = nullptr;
  int64_t layer_stride_bytes = 0;
  int64_t num_blocks = 0;
  model::KvLayout layout;
};

class AgentCore final : public comm::MessageHandler {
 public:
  // `on_done` is called from inside any other method.
  AgentCore(const KvMemory& memory, const AgentOptions& options, std::string engine_id, const Clock& clock,
            std::function<void(Done&&)> on_done);
  // Before anything else is called. The messenger must not call back after the core is gone.
  void set_messenger(comm::Messenger* messenger) { messenger_ = messenger; }

  // As in agent.h; handles are made by the caller.
  void expect(TransferId id, const Handle& handle, const BlockSpan& span, int64_t deadline_us);
  void pull(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us);
  void begin_send(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us);
  void send_blocks(TransferId id, int64_t layer, int64_t first, int64_t count);
  void commit_send(TransferId id, const FirstToken& first_token);
  void publish(TransferId id, const Handle& handle, const BlockSpan& span);
  void renew_lease(const KvTransferParams& remote);
  void decline(const KvTransferParams& remote, const Hash256& prompt);
  void release(const std::string& handle);
  void abort(TransferId id);

  // Sends some of what may be sent now; true if there is more. Call after commands and after the messenger's poll().
  bool pump();
  // Time-outs and heartbeats.
  void run_timers();
  int64_t next_timer_us() const;

  int64_t num_open() const { return std::ssize(transfers_); }
  int64_t num_links() const { return std::ssize(links_); }
  int64_t num_staged() const { return std::ssize(staged_) - num_lent_; }  // those with a buffer
  int64_t num_lent() const { return num_lent_; }

  // comm::MessageHandler
  void on_accept(comm::ConnectionId connection) override;
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override;
  void on_borrowed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                           const comm::BorrowedPayload& payload) override;
  bool find_place(comm::ConnectionId connection, std::span<const std::byte> message, int64_t payload_bytes,
                  std::vector<comm::MutableByteSpan>& pieces) override;
  void on_placed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                         int64_t payload_bytes) override;
  void on_sent(comm::ConnectionId connection, uint64_t token) override;
  void on_closed(comm::ConnectionId connection, const Error& why) override;

 private:
  struct WaitingMessage {
    Message message;
    std::string wanted_engine;  // it is for nobody else; empty: for whoever answers
  };
  // A connection and what is known of who is at its other end.
  struct Link {
    comm::ConnectionId id;
    std::string address;  // "host:port" that we connected to; empty if the peer connected to us
    bool opened_here = false;
    bool displaced = false;  // another link serves its address: closes when its last transfer has ended
    std::string peer = "the peer";  // for messages: engine id and address
    std::optional<Hello> hello;     // set once the peer is known and compatible
    std::shared_ptr<const BlockMap> map;  // from its blocks to ours; set with hello
    bool refused = false;           // closes at deadline_us
    int64_t deadline_us = 0;        // for the hello, or for the end of a refusal
    int64_t last_used_us = 0;
    int64_t last_heard_us = 0;
    std::vector<WaitingMessage> waiting;  // for the hello
    std::set<TransferId> transfers;
  };
  // A transfer of this process; exactly one of the two machines exists.
  struct Transfer {
    TransferId id;
    std::unique_ptr<SendMachine> sender;
    std::unique_ptr<ReceiveMachine> receiver;
    PartGrid grid;  // of the sender's blocks; a receiver has it and the map from the first word of the sender on
    std::shared_ptr<const BlockMap> map;
    BlockSpan span;
    int64_t num_blocks = 0;     // of the whole prompt, of our size
    std::string peer = "nobody";  // Done::peer
    std::string wanted_engine;  // the peer's engine id in the handle's parameters; may be empty
    comm::ConnectionId link;    // 0: none yet
    int64_t start_us = 0;
    std::set<uint64_t> lent;  // tokens of messages whose payload the messenger reads in our blocks

    const Handle& handle() const { return sender ? sender->handle() : receiver->handle(); }
    Side side() const { return sender ? Side::kSender : Side::kReceiver; }
  };
  struct StagedData {
    TransferId transfer;
    std::unique_ptr<std::byte[]> buffer;  // null: the payload is lent
  };
  // What came with a message: bytes that stay, bytes that their owner may take back, or bytes that lie in their place.
  struct Payload {
    std::span<const std::byte> bytes;
    const comm::BorrowedPayload* borrowed = nullptr;
    int64_t placed_bytes = 0;
    bool is_written() const { return borrowed != nullptr || placed_bytes > 0; }
    int64_t size() const { return borrowed != nullptr ? borrowed->bytes() : std::ssize(bytes) + placed_bytes; }
  };
  using HandleKey = std::pair<Side, Handle>;

  Transfer* add_transfer(TransferId id, const Handle& handle, Side side, const BlockSpan& span);
  void refuse_start(TransferId id, Error error);
  int64_t first_missing_token(const BlockSpan& span) const;
  Transfer* find(TransferId id);
  Transfer* find(Side side, const Handle& handle);
  // Carries out what a machine asked for; the transfer may be gone afterwards. `payload` is that of the message being
  // handled; one that was borrowed or placed has been written already.
  void perform(Transfer& transfer, Actions&& actions, const Payload& payload);
  void perform(Transfer& transfer, Actions&& actions) { perform(transfer, std::move(actions), Payload()); }
  void end_transfer(Transfer& transfer, Finish&& finish);
  void write_payload(const Transfer& transfer, const Write& write, std::span<const comm::ByteSpan> payload);
  std::vector<comm::ByteSpan> list_sources(const Transfer& transfer, const PartRange& parts) const;
  bool list_places(const Transfer& transfer, const Write& parts, std::vector<comm::MutableByteSpan>& pieces);
  void take_back(Transfer& transfer);
  std::byte* block_address(const Transfer& transfer, int64_t layer, int64_t block) const;
  bool send_next(Transfer& transfer);
  bool send_part(Transfer& transfer, comm::ConnectionId link, const PartRange& range);
  comm::ByteSpan stage(std::span<const comm::ByteSpan> pieces, std::byte* buffer) const;
  bool wants_checksum(comm::ConnectionId link) const;
  std::unique_ptr<std::byte[]> take_buffer();

  Result<Link*> open_link(const KvTransferParams& remote);
  void tell_once(const KvTransferParams& remote, Message&& message);
  void settle_candidate(Link& link);
  void attach(Transfer& transfer, Link& link);
  void meet_sender(Transfer& transfer, const Link& link);
  static std::string count_as(const Link& link);
  static bool is_another(const Link& link, const std::string& wanted_engine);
  void tell(Link& link, Message&& message, const std::string& wanted_engine = "");
  void tell_now(comm::ConnectionId connection, const Message& message);
  void on_hello(Link& link, const Hello& hello);
  void refuse_link(Link& link, const Error& why);
  void drop_link(comm::ConnectionId id, const Error& why);
  void fail_transfers(Link& link, const Error& why);
  void handle(comm::ConnectionId connection, std::span<const std::byte> message, const Payload& payload);
  void dispatch(Link& link, const Message& message, const Payload& payload);
  // Gives a message to the receiver; false if it is to be dropped as if it had never come.
  bool receive(Transfer& transfer, const Message& message, const Payload& payload, Actions& actions);
  void answer_stray(Link& link, const Message& message);
  void retire(const Handle& handle, Side side, FaultCode fate);

  const KvMemory memory_;
  const AgentOptions options_;
  const Hello hello_;
  const Clock& clock_;
  const std::function<void(Done&&)> on_done_;
  comm::Messenger* messenger_ = nullptr;

  std::unordered_map<TransferId, Transfer> transfers_;
  std::map<HandleKey, TransferId> by_handle_;
  std::map<HandleKey, FaultCode> retired_;
  std::deque<HandleKey> retired_order_;
  std::unordered_map<comm::ConnectionId, Link> links_;
  std::unordered_map<std::string, comm::ConnectionId> link_by_address_;
  // Second links, which shall tell whether the peer of the first one has restarted. None of them has a hello yet.
  std::unordered_map<std::string, comm::ConnectionId> candidate_by_address_;
  std::deque<TransferId> senders_;  // with something to send, in turn
  std::set<TransferId> sender_queued_;
  std::unordered_map<uint64_t, StagedData> staged_;  // by token: being sent
  std::vector<std::unique_ptr<std::byte[]>> spare_buffers_;
  std::unique_ptr<std::byte[]> nowhere_;  // takes the bytes of a payload that this side does not want
  int64_t num_lent_ = 0;
  uint64_t next_token_ = 1;
};

}  // namespace tandem::transfer
