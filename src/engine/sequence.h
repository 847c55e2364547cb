// One request inside the engine: its tokens, its blocks and where it stands.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/base/ids.h"
#include "src/engine/worker.h"
#include "src/kv/prefix_hash.h"
#include "src/transfer/agent.h"

namespace tandem::engine {

enum class SequenceState : uint8_t {
  kWaiting,    // holds no blocks; new, or preempted
  kReceiving,  // holds blocks that a transfer fills; not computed
  kRunning,    // computed in steps
  kSending,    // computed; waits until the peer has its KV
};

// What a request still has to do with other engines. A receiver becomes kNone when its KV has arrived.
enum class TransferRole : uint8_t {
  kNone,
  kPushSend,     // prefill: send blocks as they are computed
  kPullPublish,  // prefill: keep the blocks for a peer to fetch
  kPushReceive,  // decode: reserve blocks, tell the router where, receive
  kPullReceive,  // decode: fetch from the peer named in the request
  kMadeUp,       // decode benchmark: the prompt's KV is filled in
};

struct Sequence {
  Sequence(RequestId request_id, TokenRequest token_request, EventSink event_sink, int64_t block_size)
      : id(request_id),
        request(std::move(token_request)),
        sink(std::move(event_sink)),
        tokens(request.prompt),
        prompt_length(static_cast<int64_t>(tokens.size())),
        hashes(block_size, request.cache_salt) {
    tokens.insert(tokens.end(), request.resumed.begin(), request.resumed.end());
  }

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t num_generated() const { return length() - prompt_length; }
  bool in_prompt() const { return num_computed < prompt_length; }

  RequestId id;
  TokenRequest request;
  EventSink sink;
  std::vector<TokenId> tokens;  // prompt, then generated
  int64_t prompt_length;
  kv::PrefixHashes hashes;

  SequenceState state = SequenceState::kWaiting;
  int64_t num_computed = 0;     // leading tokens whose KV is in `blocks`
  std::vector<BlockId> blocks;  // held by this sequence; covers at least num_computed tokens
  int64_t num_registered = 0;   // leading blocks whose prefix was offered to the cache
  int64_t cached_tokens = 0;    // of the prompt, found in a prefix cache at the first admission

  TransferRole role = TransferRole::kNone;
  bool kv_received = false;                      // the prompt's KV came from a peer
  std::optional<transfer::TransferId> transfer;  // open transfer of this sequence
  int64_t blocks_sent = 0;                       // kPushSend: leading prompt blocks handed to the agent, all layers
  int64_t waiting_blocks = 0;                    // the scheduler's count of those that wait for another worker
  std::optional<GeneratedToken> final_token;     // kPushSend: reported when the transfer is done

  int64_t arrival_us = 0;
  int64_t first_scheduled_us = 0;
  int64_t first_token_us = 0;
};

}  // namespace tandem::engine
