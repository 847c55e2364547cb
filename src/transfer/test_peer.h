// A whole agent with its KV cache for tests, in this process or as a child process driven by lines of text.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "src/kernels/ops.h"
#include "src/model/kv_cache.h"
#include "src/transfer/agent.h"

namespace tandem::transfer {

// An agent in this process. Block b of layer l holds a pattern of (seed of b, l) when filled.
class LocalPeer {
 public:
  LocalPeer(const AgentOptions& options, const model::KvLayout& layout, int64_t num_blocks);

  Agent& agent() { return *agent_; }
  void fill(BlockId block, uint64_t seed);
  bool holds(BlockId block, uint64_t seed);
  TransferId next_id() { return TransferId(next_id_++); }
  // The Done of `id`, or nothing after `limit_us`. Those of other transfers are kept.
  std::optional<Done> wait_done(TransferId id, int64_t limit_us = 10'000'000);
  // All that have come since the last call.
  std::vector<Done> take_done();
  KvTransferParams address(const std::string& handle);
  void stop() { agent_.reset(); }
  int64_t duplicate_dones = 0;

 private:
  void collect();

  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<model::KvCache> cache_;
  std::mutex mutex_;
  std::condition_variable woken_;
  bool has_news_ = false;
  std::unique_ptr<Agent> agent_;
  std::map<TransferId, Done> done_;
  std::map<TransferId, bool> seen_;
  uint64_t next_id_ = 1;
};

std::vector<BlockId> first_blocks(int64_t count, int64_t first = 0);
AgentOptions make_options(const std::string& engine_id, comm::Transport transport);

// The same in another process: this program called with kChildFlag. Its block b is filled with seed 1000 + b.
inline constexpr const char* kChildFlag = "--transfer-test-child";
int run_child(int argc, char** argv);

class ChildPeer {
 public:
  ChildPeer(const std::string& engine_id, comm::Transport transport, int64_t port = 0);
  ~ChildPeer();
  ChildPeer(const ChildPeer&) = delete;
  ChildPeer& operator=(const ChildPeer&) = delete;

  // Sends one command and gives the first word-separated answer line:
  //   publish T              -> handle
  //   expect T               -> handle
  //   push HANDLE ENGINE PORT T PAUSE_US  -> "started"; pauses before each layer of each of 4 chunks
  //   pull HANDLE ENGINE PORT T           -> "started"
  //   wait                   -> "ok" or the name of the error kind, of the oldest open transfer
  //   check T                -> "equal" if blocks 0 … hold what LocalPeer::fill(b, 1000 + b) writes
  std::string ask(const std::string& command);
  void signal(int number) const;
  void kill_now();
  pid_t pid() const { return pid_; }
  int64_t port() const { return port_; }
  KvTransferParams address(const std::string& handle) const;

 private:
  std::string read_line();

  pid_t pid_ = -1;
  int to_child_ = -1;
  int from_child_ = -1;
  int64_t port_ = 0;
  std::string engine_id_;
};

// The layout of both: 4 layers, blocks of 16 tokens and 8 KiB.
model::KvLayout peer_layout();
inline constexpr int64_t kPeerBlocks = 2048;

}  // namespace tandem::transfer
