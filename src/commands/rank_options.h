// What the options of `tandem serve` say about ranks: how many there are, which this process is, and who starts them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/base/options.h"
#include "src/base/result.h"
#include "src/engine/dual_batch.h"
#include "src/eplb/config.h"
#include "src/group/fabric.h"
#include "src/group/shape.h"

namespace tandem::commands {

// Memory of another process of this host: kernels::Ops::open_shared.
struct SharedMemory {
  int64_t process = 0;
  int descriptor = -1;
};

// What the other tensor ranks of a data rank must know of the first one's KV cache.
struct PlannedCache {
  int64_t num_blocks = 0;
  std::optional<SharedMemory> memory;  // of all heads, if it is one for all of them
};

// The group that one rank belongs to.
struct GroupConfig {
  group::GroupShape shape;
  group::RankId rank;
  std::string coordinator_host;
  int64_t coordinator_port = 0;    // 0, with hosts_coordinator: any free one
  bool hosts_coordinator = false;  // in this very process
  std::string backend;             // --all2all-backend
  std::string dispatch_format;
  std::optional<eplb::EplbConfig> eplb;  // --enable-eplb
  engine::DualBatchLimits dual_batch;  // --enable-dbo
  int64_t rank_timeout_us = 0;
  std::optional<SharedMemory> kv_memory;  // --tensor-parallel-kv-memory
  std::vector<group::Fact> options;  // all that ranks could differ by to their harm, as they were given

  int32_t data_rank() const { return rank.value / shape.tensor; }
  int32_t tensor_rank() const { return rank.value % shape.tensor; }
  // Has no endpoint, and computes what the first of its tensor ranks orders.
  bool is_follower() const { return tensor_rank() > 0; }
};

// Data ranks that this process starts as children. Each of them starts its own tensor ranks.
struct NodeConfig {
  group::GroupShape shape;
  int32_t first_rank = 0;
  int32_t num_ranks = 0;
  std::string coordinator_host;
  int64_t coordinator_port = 0;  // 0: any free one
  bool hosts_coordinator = false;
  bool has_front_end = true;       // false: headless
  bool serves_node_only = false;   // the front end knows this node's ranks only
  std::optional<eplb::EplbConfig> eplb;  // --enable-eplb, of its ranks
  int64_t rank_timeout_us = 0;
};

// Both are unset for a server that is alone; at most one is set.
struct RankOptions {
  std::optional<GroupConfig> group;
  std::optional<NodeConfig> node;
};

// Faults name the options that contradict each other.
Result<RankOptions> read_rank_options(const Options& options);

// What a child that is a rank of the group is told about it.
std::vector<std::string> rank_arguments(const Options& options, const group::GroupShape& shape, int32_t data_rank,
                                        const std::string& coordinator_host, int64_t coordinator_port);

// `text` as the value of a fact: longer ones by their hash.
std::string fact_value(const std::string& text);

// The group of options in the table that all this stands in.
inline constexpr const char* kRankOptionGroup = "Ranks";

}  // namespace tandem::commands
