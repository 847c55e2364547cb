// The invariants of a run that concern blocks and transfers. Numbers are those of docs/transfer.md.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/engine/engine.h"
#include "src/sim/event_queue.h"
#include "src/sim/trace.h"
#include "src/transfer/agent_core.h"

namespace tandem::sim {

enum class TransferKind : uint8_t { kExpect, kPull, kSend, kPublish };

class Checker {
 public:
  // A transfer's end is known at its other side this much later, if nothing is wrong on the way (I6).
  static constexpr int64_t kToldWithinUs = 1'500'000;
  // Trouble may show this much later: time-outs, links that are found dead.
  static constexpr int64_t kSettleUs = 20'000'000;

  // A node that has something to do does it at least this often, unless it waits for another one.
  static constexpr int64_t kStandstillUs = 2'000'000;

  Checker(EventQueue& queue, Trace& trace, int num_nodes);

  // What the engine asks its agent for, and what the core answers. `blocks` are the agent's from open until done.
  void open(int node, transfer::TransferId id, TransferKind kind, const std::string& handle,
            const std::vector<BlockId>& blocks);
  void done(int node, const transfer::Done& done);
  // Every handle is given out once in the life of the cluster (I2).
  void give_handle(int node, const std::string& handle);
  void forget_node(int node);
  // From now on every publication is the production router's, which hears of each, knows when nobody comes for it, and
  // says so. A node may compute for `longest_step_us` before it looks at anything. Unset: a foreign router's.
  void watch_publications(std::optional<int64_t> longest_step_us) { longest_step_us_ = longest_step_us; }
  void hear_of(const std::string& handle) { heard_.insert(handle); }
  // Who was to fetch this publication ("": none) has ended, or there is nobody.
  void expect_no_reader(const std::string& handle);

  // Something went wrong on purpose, and lasts until then.
  void disturb(int64_t until_us) { disturbed_until_us_ = std::max(disturbed_until_us_, until_us); }
  // Nothing was wrong from shortly before `since_us` until now.
  bool calm_since(int64_t since_us) const { return disturbed_until_us_ + kSettleUs < since_us; }

  // The node computes until then, or a transfer has moved on there: whoever waits for it does not wait for nothing.
  void active(int node, int64_t until_us) {
    int64_t& last_us = active_us_[static_cast<size_t>(node)];
    last_us = std::max(last_us, until_us);
  }
  // A foreign router forgets a leg on purpose, whose blocks nobody asks for until then.
  void forget_leg(int64_t until_us) { forgotten_until_us_ = std::max(forgotten_until_us_, until_us); }
  bool has_forgotten_since(int64_t since_us) const { return forgotten_until_us_ >= since_us; }
  // None of these nodes has been active for kStandstillUs, and nothing that was done on purpose explains it.
  bool stand_still(std::span<const int> nodes) const;

  // After each event of the node (I1): what the agent may touch is pinned, and nobody else's.
  void check_open_blocks(int node, const engine::Engine& engine) const;
  // After a turn of the engine (I4): nothing is past its deadline.
  void check_deadlines(int node, const engine::Engine& engine) const;
  // After the quiet period (I14).
  void check_at_rest(int node, const engine::Engine& engine, const transfer::AgentCore& core) const;
  void check_bounds(int node, const transfer::AgentCore& core, int64_t num_connections) const;

  // Publications that nobody has asked for.
  int64_t num_unread(int node) const;
  // One that nobody came for has held blocks of the node until `since_us` or later, when its lease was over.
  bool had_orphan_since(int node, int64_t since_us) const {
    return orphan_until_us_[static_cast<size_t>(node)] >= since_us;
  }
  int64_t num_open(int node) const { return std::ssize(open_[static_cast<size_t>(node)]); }

 private:
  struct Open {
    TransferKind kind;
    std::string handle;
    std::vector<BlockId> blocks;
  };
  struct Place {
    int node;
    transfer::TransferId id;
    int64_t since_us;
  };
  void check_told(const std::string& handle, int64_t ended_us, const char* what) const;
  void check_heard(const std::string& handle, int64_t published_us) const;

  EventQueue& queue_;
  Trace& trace_;
  std::vector<std::map<transfer::TransferId, Open>> open_;  // by node
  std::unordered_map<std::string, std::vector<Place>> by_handle_;
  std::set<std::string> handles_;
  std::set<std::string> heard_;
  std::optional<int64_t> longest_step_us_;  // set: publications are watched
  std::vector<int64_t> active_us_;        // by node
  std::vector<int64_t> orphan_until_us_;  // by node
  int64_t disturbed_until_us_ = -2 * kSettleUs;
  int64_t forgotten_until_us_ = 0;
};

// Free blocks are filled with a pattern, so that a foreign write is seen at once and a read of stale KV changes the
// answer.
class Canary {
 public:
  Canary(model::KvCache& cache, const kv::BlockPool& pool);
  // Fills blocks that became free since the last look. Throws if one that was free then, and is still, has changed;
  // after a turn of the engine that is no fault, since it may have been used in between.
  void look(bool after_turn);

 private:
  bool intact(BlockId block) const;

  model::KvCache& cache_;
  const kv::BlockPool& pool_;
  std::vector<std::byte> pattern_;
  std::vector<bool> was_free_;
};

}  // namespace tandem::sim
