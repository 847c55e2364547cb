// The agent moves KV blocks between engines. It runs on its own thread; the engine thread talks to it by plain values.
//
// Ownership: from the call that names a block (expect, pull, begin_send, publish) until the transfer's one Done event,
// the agent may read or write the block, so the engine must keep it pinned. Done is delivered exactly once per
// transfer, after which the agent never touches its blocks again, whatever the peer does.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/base/hash.h"
#include "src/base/ids.h"
#include "src/base/kv_transfer_config.h"
#include "src/base/result.h"
#include "src/comm/messenger.h"
#include "src/model/kv_cache.h"
#include "src/transfer/params.h"

namespace tandem::transfer {

// One transfer in this process; never reused.
using TransferId = StrongId<struct TransferIdTag, uint64_t>;

// What prefill tells decode besides the blocks: the first token, sampled by prefill (push only).
struct FirstToken {
  TokenId token = 0;
  float logprob = 0;
  std::vector<std::pair<TokenId, float>> top_logprobs;
  int64_t cached_tokens = 0;  // of the prompt, found in prefill's prefix cache; for usage
};

// The blocks of one side, in prompt order. Block i holds tokens [i * block_size, (i + 1) * block_size) of the prompt.
struct BlockSpan {
  int64_t first_block = 0;       // index of blocks[0] in the prompt: earlier blocks are in decode's prefix cache
  std::vector<BlockId> blocks;   // for the receiver: where to write; for the sender: where to read
  int64_t num_tokens = 0;        // of the whole prompt
  Hash256 prompt{};              // of the prompt's tokens: both sides must mean the same, or its KV would be filed under
                                 // another prompt
};

struct Done {
  TransferId id;
  Status status;                        // kAborted after abort(), kUnavailable if the peer is gone, …
  std::optional<FirstToken> first_token;  // receiver of a push, on success
  int64_t bytes = 0;
  int64_t duration_us = 0;
  // Who was at the other end, for counters: its engine id without the incarnation, "host:port" if it never said hello,
  // or "nobody".
  std::string peer = "nobody";
};

// Whether each message carries a checksum of its payload. kAuto: where payloads leave the memory of this host.
enum class KvChecksum : uint8_t { kAuto, kOn, kOff };

struct AgentOptions {
  std::string engine_id;
  std::string listen_host = "127.0.0.1";  // address that peers connect to
  int64_t listen_port = 0;                // 0: any free port
  std::string model_fingerprint;          // must be equal on both sides
  KvChecksum checksum = KvChecksum::kAuto;  // of what this side sends
  int64_t lease_us = 30'000'000;          // of published blocks without a reader or heartbeat
  int64_t connect_timeout_us = 5'000'000;
  int64_t idle_timeout_us = 10'000'000;   // no progress of a transfer for this long fails it
  KvRole role = KvRole::kBoth;            // two producers or two consumers refuse each other
  comm::Transport transport = comm::Transport::kAuto;
};

class Agent {
 public:
  virtual ~Agent() = default;

  // "<engine_id>:<incarnation>" and the port in use.
  virtual const std::string& engine_id() const = 0;
  virtual int64_t port() const = 0;

  // Decode, push: prepares to receive `span` and returns at once with the handle the prefill side must present
  // (remote_request_id). `deadline_us` is on SteadyClock; 0 means the idle time-out alone.
  virtual std::string expect(TransferId id, const BlockSpan& span, int64_t deadline_us) = 0;
  // Decode, pull: asks the peer named in `remote` for its blocks from span.first_block on and receives them.
  virtual void pull(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) = 0;

  // Prefill, push: `remote` is decode's address. Blocks follow by send_blocks as layers and chunks complete.
  virtual void begin_send(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) = 0;
  // Blocks [first, first + count) of the prompt are complete in `layer` and may be sent. Indices below the span's
  // first_block are skipped.
  virtual void send_blocks(TransferId id, int64_t layer, int64_t first, int64_t count) = 0;
  // Everything has been handed over; the first token completes the transfer.
  virtual void commit_send(TransferId id, const FirstToken& first_token) = 0;

  // Prefill, pull: the span's blocks (first_block 0) may be fetched once by who presents the returned handle; they
  // stay pinned until fetched, aborted by the peer, released, or the lease ends.
  virtual std::string publish(TransferId id, const BlockSpan& span) = 0;

  // Decode, pull, before pull(): the request waits in this engine's queue. Extends the peer's lease; call it every few
  // seconds. Best effort, without Done.
  virtual void renew_lease(const KvTransferParams& remote) { (void)remote; }
  // Decode, pull, instead of pull(): the request has ended here, so the peer may free what it published. `prompt` as in
  // BlockSpan; a publication of another prompt stays as it is, and so does one that is being fetched by this agent.
  virtual void decline(const KvTransferParams& remote, const Hash256& prompt) { (void)remote, (void)prompt; }

  // Prefill, pull: nobody is to fetch the publication of this handle. As abort(), also if somebody fetches it just now;
  // ignored if the handle is unknown or that of another kind of transfer.
  virtual void release(const std::string& handle) = 0;
  // Ends a transfer early: the peer is told; Done follows when no read or write is left in flight.
  virtual void abort(TransferId id) = 0;

  // Takes the Done events so far. `wake` given to make_agent is called (from the agent's thread) when there are some.
  virtual std::vector<Done> take_done() = 0;

  // Transfers that have not had their Done yet.
  virtual int64_t num_open() const = 0;
};

// What connects an agent with its peers; the handler outlives it. A test may put something in between.
using MakeMessenger =
    std::function<Result<std::unique_ptr<comm::Messenger>>(const comm::MessengerOptions&, comm::MessageHandler&)>;

// Binds to the KV memory (registered with the transport) and starts the thread. The cache must outlive the agent.
Result<std::unique_ptr<Agent>> make_agent(model::KvCache& cache, const AgentOptions& options,
                                          std::function<void()> wake,
                                          const MakeMessenger& make_messenger = comm::make_messenger);

}  // namespace tandem::transfer
