// The decode side of one transfer. States:
//   kExpecting   push: a handle was given out; waits for Begin
//   kRequested   pull: Pull was sent; waits for the first answer
//   kReceiving   Data and Commit arrive, in any order
//   kEnded       Finish was emitted; every further event is ignored
// All or nothing: success needs a Commit that agrees in tokens and bytes, and every part of every layer.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "src/transfer/actions.h"
#include "src/transfer/part_grid.h"

namespace tandem::transfer {

struct ReceiveSpec {
  Handle handle;
  bool pull = false;
  int64_t num_tokens = 0;
  int64_t first_token = 0;  // earlier ones are here already; num_tokens if all are
  int64_t deadline_us = 0;  // 0: none
  int64_t idle_timeout_us = 0;
  Hash256 prompt{};  // BlockSpan::prompt
};

class ReceiveMachine {
 public:
  enum class State : uint8_t { kExpecting, kRequested, kReceiving, kEnded };

  ReceiveMachine(const ReceiveSpec& spec, int64_t now_us);

  // How the sender's blocks are cut; before the first message of it. Of the same sender, hence the same every time.
  void set_sender_grid(const PartGrid& grid);
  // Pull: emits the Pull message.
  void start(int64_t now_us, Actions& out);
  // Begin, Data, Commit, Heartbeat, Abort or Fault of this handle. For Data, `payload_bytes` came with it and `intact`
  // is false if the checksum disagrees.
  void receive(const Message& message, int64_t payload_bytes, bool intact, int64_t now_us, Actions& out);
  // Where the payload of `data` would be written if receive() got it now, intact; nothing if it would not be written.
  std::optional<Write> find_place(const Data& data, int64_t payload_bytes) const;
  void lose_peer(const Error& why, Actions& out);
  void abort(Actions& out);
  void expire(int64_t now_us, Actions& out);

  // When expire() has something to do.
  int64_t next_expiry_us() const;
  State state() const { return state_; }
  const Handle& handle() const { return spec_.handle; }

 private:
  void on_begin(const Begin& begin, int64_t now_us, Actions& out);
  void on_data(const Data& data, int64_t payload_bytes, bool intact, int64_t now_us, Actions& out);
  void on_commit(const Commit& commit, int64_t now_us, Actions& out);
  // Tells the peer, and ends with the same text.
  void refuse(FaultCode code, ErrorKind kind, std::string text, Actions& out);
  void finish(Status status, Actions& out);
  void try_complete(Actions& out);
  bool is_in_range(const Data& data) const;
  int64_t count_present(const Data& data) const;
  std::string describe_progress() const;

  ReceiveSpec spec_;
  State state_;
  int64_t last_heard_us_;
  int64_t last_progress_us_;
  PartGrid grid_;            // the sender's, once it is known
  int64_t first_part_ = 0;   // of a layer: earlier parts are not wanted
  int64_t expected_bytes_ = 0;
  int64_t received_bytes_ = 0;
  std::vector<bool> have_;  // per layer and part
  std::optional<Commit> commit_;
};

}  // namespace tandem::transfer
