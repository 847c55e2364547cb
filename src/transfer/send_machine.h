// The prefill side of one transfer. States:
//   kPublished   pull: waits for Pull under a lease
//   kOffered     push: Begin was sent; waits for Accept
//   kStreaming   sends parts as the engine hands them over (push) or all of them (pull)
//   kCommitted   Commit was sent; waits for Ack
//   kEnded       Finish was emitted; every further event is ignored
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "src/transfer/actions.h"
#include "src/transfer/part_grid.h"

namespace tandem::transfer {

// Messages of one transfer that the transport has not finished; bounds its memory and its share of the line. 8 MiB: what a
// receiver copies within a host while it and the sender are woken once by turns.
inline constexpr int64_t kMaxDataInFlight = 128;

struct SendSpec {
  Handle handle;
  bool pull = false;
  PartGrid grid;  // of this side's blocks
  int64_t num_tokens = 0;
  int64_t first_block = 0;  // earlier blocks are not offered
  int64_t deadline_us = 0;  // 0: none
  int64_t idle_timeout_us = 0;
  int64_t lease_us = 0;  // pull
  Hash256 prompt{};  // BlockSpan::prompt
};

// Parts of one layer that fit into one message.
struct PartRange {
  int64_t layer = 0;
  int64_t first_part = 0;
  int64_t num_parts = 0;
};

class SendMachine {
 public:
  enum class State : uint8_t { kPublished, kOffered, kStreaming, kCommitted, kEnded };

  SendMachine(const SendSpec& spec, int64_t now_us);

  // Push: emits Begin.
  void start(int64_t now_us, Actions& out);
  // Push: blocks [first, first + count) of the prompt are ready in `layer`, each once. Those below what the span or
  // the receiver wants are skipped.
  void add_blocks(int64_t layer, int64_t first, int64_t count, int64_t now_us);
  // Push: everything was added.
  void commit(const FirstToken& first_token, int64_t now_us);

  // Accept, Pull, Ack, Heartbeat, Abort or Fault of this handle.
  void receive(const Message& message, int64_t now_us, Actions& out);
  // What to send next, or nothing for now. The caller copies it and calls data_sent() when the transport has it; it
  // then asks advance(), which emits Commit after the last part.
  std::optional<PartRange> next_data(int64_t now_us);
  void data_sent(int64_t now_us);
  void advance(int64_t now_us, Actions& out);

  void lose_peer(const Error& why, Actions& out);
  void abort(Actions& out);
  // Time-outs and heartbeats.
  void expire(int64_t now_us, Actions& out);
  int64_t next_expiry_us() const;
  // The peer's idle time-out, once known: it hears of us more often.
  void set_peer_idle_timeout(int64_t idle_timeout_us) { peer_idle_timeout_us_ = idle_timeout_us; }

  State state() const { return state_; }
  bool is_publication() const { return spec_.pull; }
  const Handle& handle() const { return spec_.handle; }

 private:
  void on_accept(const Accept& accept, int64_t now_us, Actions& out);
  void on_pull(const Pull& pull, int64_t now_us, Actions& out);
  void on_ack(const Ack& ack, Actions& out);
  void refuse(FaultCode code, ErrorKind kind, std::string text, Actions& out);
  void finish(Status status, Actions& out);
  void begin_streaming(int64_t first_block, int64_t now_us);
  void skip_unwanted();
  bool waits_for_peer() const;
  int64_t next_limit_us() const;
  std::string describe_progress() const;

  SendSpec spec_;
  State state_;
  std::deque<PartRange> ready_;  // at most layers * blocks entries
  std::vector<bool> added_;      // per layer and block: each is handed over once
  int64_t num_added_ = 0;
  std::optional<FirstToken> first_token_;
  bool all_added_ = false;
  int64_t wanted_block_ = 0;  // the first that the receiver lacks some of, once known
  int64_t in_flight_ = 0;
  int64_t sent_bytes_ = 0;
  int64_t last_progress_us_;
  int64_t last_told_us_;
  int64_t lease_end_us_ = 0;
  int64_t peer_idle_timeout_us_ = 0;
};

}  // namespace tandem::transfer
