#include "src/sim/checker.h"

#include <algorithm>
#include <cstring>

#include "src/sim/violation.h"

namespace tandem::sim {
namespace {

constexpr std::byte kPoison{0x5a};

bool receives(TransferKind kind) { return kind == TransferKind::kExpect || kind == TransferKind::kPull; }

}  // namespace

Checker::Checker(EventQueue& queue, Trace& trace, int num_nodes)
    : queue_(queue),
      trace_(trace),
      open_(static_cast<size_t>(num_nodes)),
      active_us_(static_cast<size_t>(num_nodes)),
      orphan_until_us_(static_cast<size_t>(num_nodes), INT64_MIN) {}

void Checker::open(int node, transfer::TransferId id, TransferKind kind, const std::string& handle,
                   const std::vector<BlockId>& blocks) {
  trace_.add(What::kOpen, node, id.value, static_cast<uint64_t>(kind));
  open_[static_cast<size_t>(node)].emplace(id, Open{kind, handle, blocks});
  by_handle_[handle].push_back({node, id, queue_.now_us()});
  if (kind != TransferKind::kPublish || !longest_step_us_) return;
  const int64_t now_us = queue_.now_us();
  queue_.add(now_us + kToldWithinUs, {}, [this, handle, now_us] { check_heard(handle, now_us); });
}

void Checker::check_heard(const std::string& handle, int64_t published_us) const {
  const auto found = by_handle_.find(handle);
  if (found == by_handle_.end() || heard_.contains(handle) || !calm_since(published_us)) return;
  throw Violation("publication-is-known",
                  fmt::format("{} us after node {} published transfer {} the router has not heard of it",
                              queue_.now_us() - published_us, found->second.front().node, found->second.front().id));
}

void Checker::expect_no_reader(const std::string& handle) {
  if (handle.empty() || !longest_step_us_) return;
  const int64_t now_us = queue_.now_us();
  queue_.add(now_us + kToldWithinUs + *longest_step_us_, {},
             [this, handle, now_us] { check_told(handle, now_us, "nobody comes for a publication"); });
}

void Checker::done(int node, const transfer::Done& done) {
  const uint64_t outcome = done.status.ok() ? 0 : 1 + static_cast<uint64_t>(done.status.error().kind);
  trace_.add(What::kDone, node, done.id.value, outcome);
  const auto found = open_[static_cast<size_t>(node)].find(done.id);
  if (found == open_[static_cast<size_t>(node)].end()) {
    throw Violation("one-done", fmt::format("node {} says a second time that transfer {} is done", node, done.id));
  }
  if (!done.status.ok() && done.status.error().message.empty()) {
    throw Violation("named-error", fmt::format("transfer {} of node {} failed without words", done.id, node));
  }
  if (done.status.ok()) active(node, queue_.now_us());
  const std::string handle = found->second.handle;
  const bool is_unread = found->second.kind == TransferKind::kPublish && by_handle_.at(handle).size() == 1;
  if (is_unread && !done.status.ok()) orphan_until_us_[static_cast<size_t>(node)] = queue_.now_us();
  open_[static_cast<size_t>(node)].erase(found);
  std::vector<Place>& places = by_handle_[handle];
  std::erase_if(places, [&](const Place& place) { return place.node == node && place.id == done.id; });
  if (places.empty()) {
    by_handle_.erase(handle);
    return;
  }
  const int64_t now_us = queue_.now_us();
  queue_.add(now_us + kToldWithinUs, {},
             [this, handle, now_us] { check_told(handle, now_us, "a transfer ended on one side"); });
}

void Checker::check_told(const std::string& handle, int64_t ended_us, const char* what) const {
  const auto found = by_handle_.find(handle);
  if (found == by_handle_.end() || !calm_since(ended_us)) return;
  for (const Place& place : found->second) {
    if (place.since_us > ended_us) continue;  // a used handle that somebody tries again
    throw Violation("end-is-told",
                    fmt::format("{}; {} us later node {} still has it open as {}", what, queue_.now_us() - ended_us,
                                place.node, place.id));
  }
}

void Checker::give_handle(int node, const std::string& handle) {
  if (!handles_.insert(handle).second) {
    throw Violation("handle-once", fmt::format("node {} gives out handle {} a second time", node, handle));
  }
}

void Checker::forget_node(int node) {
  for (const auto& [id, open] : open_[static_cast<size_t>(node)]) {
    std::vector<Place>& places = by_handle_[open.handle];
    std::erase_if(places, [&](const Place& place) { return place.node == node; });
    if (places.empty()) by_handle_.erase(open.handle);
  }
  open_[static_cast<size_t>(node)].clear();
}

int64_t Checker::num_unread(int node) const {
  const std::map<transfer::TransferId, Open>& open = open_[static_cast<size_t>(node)];
  return std::count_if(open.begin(), open.end(), [this](const auto& entry) {
    return entry.second.kind == TransferKind::kPublish && by_handle_.at(entry.second.handle).size() == 1;
  });
}

bool Checker::stand_still(std::span<const int> nodes) const {
  const int64_t since_us = queue_.now_us() - kStandstillUs;
  if (nodes.empty() || !calm_since(since_us) || forgotten_until_us_ > since_us) return false;
  return std::all_of(nodes.begin(), nodes.end(),
                     [&](int node) { return active_us_[static_cast<size_t>(node)] < since_us; });
}

void Checker::check_open_blocks(int node, const engine::Engine& engine) const {
  const std::map<transfer::TransferId, Open>& transfers = open_[static_cast<size_t>(node)];
  if (transfers.empty()) return;
  const kv::BlockPool& pool = engine.pool();
  std::vector<int8_t> use(static_cast<size_t>(pool.num_blocks()), 0);  // 1: read, 2: written
  int64_t pins = 0;
  for (const auto& [id, open] : transfers) {
    pins += std::ssize(open.blocks);
    const bool writes = receives(open.kind);
    for (BlockId block : open.blocks) {
      int8_t& used = use[static_cast<size_t>(block.value)];
      const int64_t holders = pool.holders(block);
      if (holders < 1 || (writes && holders > 2) || used == 2 || (used == 1 && writes)) {
        throw Violation("pinned-while-open",
                        fmt::format("block {} of node {} belongs to open transfer {} and has {} holders{}", block, node,
                                    id, holders, used != 0 ? "; another transfer has it too" : ""));
      }
      used = writes ? 2 : 1;
    }
  }
  if (pool.num_pinned() < pins) {
    throw Violation("pinned-while-open", fmt::format("open transfers of node {} may touch {} blocks, {} are pinned",
                                                     node, pins, pool.num_pinned()));
  }
}

void Checker::check_deadlines(int node, const engine::Engine& engine) const {
  for (const auto& [id, sequence] : engine.scheduler().sequences()) {
    const int64_t deadline_us = sequence->request.deadline_us;
    if (deadline_us != 0 && deadline_us < queue_.now_us()) {
      throw Violation("deadline", fmt::format("request {} of node {} lives {} us after its deadline", id, node,
                                              queue_.now_us() - deadline_us));
    }
  }
}

void Checker::check_at_rest(int node, const engine::Engine& engine, const transfer::AgentCore& core) const {
  const kv::BlockPool& pool = engine.pool();
  pool.check_integrity();
  const auto expect = [node](const char* what, int64_t is, int64_t should) {
    if (is != should)
      throw Violation("at-rest", fmt::format("{} of node {}: {} instead of {}", what, node, is, should));
  };
  expect("sequences", engine.scheduler().num_sequences(), 0);
  expect("sequences running", engine.scheduler().num_running(), 0);
  expect("sequences receiving", engine.scheduler().num_receiving(), 0);
  expect("open transfers of the engine", engine.num_open_transfers(), 0);
  expect("open transfers of the agent", core.num_open(), 0);
  expect("transfers without Done", num_open(node), 0);
  expect("staging buffers in use", core.num_staged(), 0);
  expect("pinned blocks", pool.num_pinned(), 0);
  expect("free and cached blocks", pool.num_available(), pool.num_blocks());
}

void Checker::check_bounds(int node, const transfer::AgentCore& core, int64_t num_connections) const {
  const auto expect = [node](const char* what, int64_t is, int64_t limit) {
    if (is > limit) throw Violation("bounds", fmt::format("{} of node {}: {}, the limit is {}", what, node, is, limit));
  };
  expect("transfers", core.num_open(), transfer::kMaxTransfers);
  expect("staging buffers", core.num_staged(), transfer::kMaxStaged);
  expect("lent payloads", core.num_lent(), transfer::kMaxLent);
  expect("connections", num_connections, comm::kMaxConnections);
}

// ---- Canary --------------------------------------------------------------------------------------------------------

Canary::Canary(model::KvCache& cache, const kv::BlockPool& pool)
    : cache_(cache),
      pool_(pool),
      pattern_(static_cast<size_t>(cache.layout().block_bytes()), kPoison),
      was_free_(static_cast<size_t>(cache.num_blocks()), false) {
  look(true);
}

bool Canary::intact(BlockId block) const {
  for (int64_t layer = 0; layer < cache_.layout().num_layers; ++layer) {
    if (std::memcmp(cache_.block_address(layer, block), pattern_.data(), pattern_.size()) != 0) return false;
  }
  return true;
}

void Canary::look(bool after_turn) {
  for (int32_t i = 0; i < cache_.num_blocks(); ++i) {
    const BlockId block(i);
    const bool is_free = pool_.is_free(block);
    const bool was_free = was_free_[static_cast<size_t>(i)];
    was_free_[static_cast<size_t>(i)] = is_free;
    if (!is_free) continue;
    if (was_free && intact(block)) continue;
    if (was_free && !after_turn) {
      throw Violation("free-blocks-untouched", fmt::format("free block {} was written", block));
    }
    for (int64_t layer = 0; layer < cache_.layout().num_layers; ++layer) {
      std::memcpy(cache_.block_address(layer, block), pattern_.data(), pattern_.size());
    }
  }
}

}  // namespace tandem::sim
