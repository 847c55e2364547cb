#include "src/commands/rank_options.h"

#include <algorithm>
#include <charconv>

#include "src/base/hash.h"

namespace tandem::commands {
namespace {

constexpr int64_t kDefaultPort = 29550;  // where ranks of several nodes meet, as with vLLM

Result<eplb::EplbConfig> read_eplb(const std::string& text) {
  if (text.empty()) return eplb::EplbConfig{};
  TANDEM_ASSIGN(const eplb::EplbConfig config, eplb::parse_eplb_config(text));
  if (!config.use_async) {
    return invalid_argument("eplb-config",
                            "--eplb-config: use_async is false, but experts always move while steps go on; leave it out");
  }
  return config;
}

// Of --tensor-parallel-kv-memory.
Result<std::optional<SharedMemory>> read_kv_memory(const Options& options) {
  const std::string& text = options.text("tensor-parallel-kv-memory");
  if (text.empty()) return std::optional<SharedMemory>();
  SharedMemory memory;
  const char* const end = text.data() + text.size();
  const std::from_chars_result process = std::from_chars(text.data(), end, memory.process);
  const bool has_colon = process.ec == std::errc() && process.ptr != end && *process.ptr == ':';
  const std::from_chars_result descriptor =
      has_colon ? std::from_chars(process.ptr + 1, end, memory.descriptor) : process;
  if (!has_colon || descriptor.ec != std::errc() || descriptor.ptr != end || memory.process < 1 || memory.descriptor < 0) {
    return invalid_argument("tensor-parallel-kv-memory",
                            "--tensor-parallel-kv-memory {} is not PROCESS:DESCRIPTOR, two numbers; leave it out: tensor "
                            "rank 0 gives it to the ranks that it starts",
                            text);
  }
  return std::optional<SharedMemory>(memory);
}

// The values of the options that what a group agrees on can follow from.
std::vector<group::Fact> describe_options(const Options& options) {
  std::vector<group::Fact> out;
  for (const char* const name :
       {"dtype", "quantization", "quantization-group-size", "lm-head-quantization", "load-format", "seed",
        "moe-routing-simulation", "kv-cache-dtype", "block-size", "max-model-len", "max-num-batched-tokens",
        "max-num-seqs", "all2all-backend", "dispatch-format", "enable-eplb", "eplb-config", "enable-dbo", "device",
        "cpu-isa", "rank-timeout"}) {
    out.push_back({fmt::format("--{}", name), fact_value(options.as_text(name))});
  }
  out.push_back({"the path of the model", fact_value(options.text("model"))});
  return out;
}

Result<RankOptions> read_group(const Options& options, const group::GroupShape& shape, int64_t rank) {
  const int64_t tensor_rank = options.integer("tensor-parallel-rank");
  if (tensor_rank >= shape.tensor) {
    return invalid_argument("tensor-parallel-rank",
                            "--tensor-parallel-rank is {}, but --tensor-parallel-size {} has 0 … {}", tensor_rank,
                            shape.tensor, shape.tensor - 1);
  }
  if (rank >= shape.data) {
    return invalid_argument("data-parallel-rank", "--data-parallel-rank is {}, but --data-parallel-size {} has 0 … {}",
                            rank, shape.data, shape.data - 1);
  }
  if (options.flag("headless")) {
    return invalid_argument("headless", "--headless and --data-parallel-rank exclude each other: a rank that is started "
                                        "by itself has its own endpoint");
  }
  GroupConfig config;
  config.shape = shape;
  config.rank = group::RankId(static_cast<int32_t>(rank * shape.tensor + tensor_rank));
  config.coordinator_host = options.text("data-parallel-address");
  config.coordinator_port = options.integer("data-parallel-rpc-port");
  if (config.coordinator_port == 0 && shape.data > 1) config.coordinator_port = kDefaultPort;
  if (config.coordinator_port == 0 && tensor_rank > 0) {
    return invalid_argument("data-parallel-rpc-port",
                            "--tensor-parallel-rank {} needs --data-parallel-rpc-port, where tensor rank 0 is met; a server "
                            "starts its tensor ranks itself",
                            tensor_rank);
  }
  config.hosts_coordinator = config.rank.value == 0 && options.text("data-parallel-coordinator") == "auto";
  config.backend = options.text("all2all-backend");
  config.dispatch_format = options.text("dispatch-format");
  config.dual_batch = {options.flag("enable-dbo"), options.integer("dbo-decode-token-threshold"),
                       options.integer("dbo-prefill-token-threshold")};
  config.rank_timeout_us = static_cast<int64_t>(options.number("rank-timeout") * 1e6);
  TANDEM_ASSIGN(config.kv_memory, read_kv_memory(options));
  if (options.flag("enable-eplb")) {
    TANDEM_ASSIGN(config.eplb, read_eplb(options.text("eplb-config")));
  }
  config.options = describe_options(options);
  RankOptions out;
  out.group = std::move(config);
  return out;
}

Result<RankOptions> read_node(const Options& options, const group::GroupShape& shape) {
  NodeConfig config;
  config.shape = shape;
  const int64_t first = options.integer("data-parallel-start-rank");
  const int64_t local = options.integer("data-parallel-size-local");
  const int64_t num_ranks = local == 0 ? shape.data - first : local;
  if (num_ranks < 1 || first + num_ranks > shape.data) {
    return invalid_argument("data-parallel-start-rank",
                            "--data-parallel-start-rank {} and --data-parallel-size-local {} are ranks {} … {}, but "
                            "--data-parallel-size {} has 0 … {}",
                            first, local, first, first + std::max<int64_t>(1, num_ranks) - 1, shape.data, shape.data - 1);
  }
  if (options.text("data-parallel-coordinator") != "auto") {
    return invalid_argument("data-parallel-coordinator",
                            "--data-parallel-coordinator elsewhere is for one rank, with --data-parallel-rank; leave it out");
  }
  config.first_rank = static_cast<int32_t>(first);
  config.num_ranks = static_cast<int32_t>(num_ranks);
  config.coordinator_host = options.text("data-parallel-address");
  config.coordinator_port = options.integer("data-parallel-rpc-port");
  if (config.coordinator_port == 0 && config.num_ranks < shape.data) config.coordinator_port = kDefaultPort;
  config.hosts_coordinator = first == 0;
  config.has_front_end = !options.flag("headless");
  config.serves_node_only = options.flag("data-parallel-hybrid-lb");
  if (options.flag("enable-eplb")) {
    TANDEM_ASSIGN(config.eplb, read_eplb(options.text("eplb-config")));
  }
  config.rank_timeout_us = static_cast<int64_t>(options.number("rank-timeout") * 1e6);
  if (!config.has_front_end && config.hosts_coordinator) {
    return invalid_argument("headless",
                            "--headless is for nodes without rank 0; give --data-parallel-start-rank, or leave it out");
  }
  if (config.has_front_end && !config.hosts_coordinator && !config.serves_node_only) {
    return invalid_argument("data-parallel-start-rank",
                            "a node that begins at rank {} needs --headless (the endpoint is that of rank 0's node) or "
                            "--data-parallel-hybrid-lb (an endpoint on every node)",
                            first);
  }
  RankOptions out;
  out.node = std::move(config);
  return out;
}

}  // namespace

std::string fact_value(const std::string& text) {
  return std::ssize(text) <= group::kMaxFactBytes ? text : "SHA-256 " + Sha256().add(text).finish().hex();
}

Result<RankOptions> read_rank_options(const Options& options) {
  const int64_t rank = options.integer("data-parallel-rank");
  const group::GroupShape shape{static_cast<int32_t>(options.integer("data-parallel-size")),
                                static_cast<int32_t>(options.integer("tensor-parallel-size"))};
  if (options.flag("data-parallel-external-lb") && rank < 0) {
    return invalid_argument("data-parallel-external-lb",
                            "--data-parallel-external-lb needs --data-parallel-rank: every rank is started by itself");
  }
  if (shape.size() > group::kMaxRanks) {
    return invalid_argument("tensor-parallel-size",
                            "--data-parallel-size {} x --tensor-parallel-size {} are {} ranks, a group has at most {}",
                            shape.data, shape.tensor, shape.size(), group::kMaxRanks);
  }
  if (!options.text("tensor-parallel-kv-memory").empty() && options.integer("tensor-parallel-rank") == 0) {
    return invalid_argument("tensor-parallel-kv-memory",
                            "--tensor-parallel-kv-memory is for --tensor-parallel-rank from 1 on; leave it out");
  }
  const std::string& eplb = options.text("eplb-config");
  if (!eplb.empty() && !options.flag("enable-eplb")) {
    return invalid_argument("eplb-config", "--eplb-config needs --enable-eplb");
  }
  TANDEM_TRY(read_eplb(eplb));
  for (const char* const name : {"dbo-decode-token-threshold", "dbo-prefill-token-threshold"}) {
    if (options.is_set(name) && !options.flag("enable-dbo")) {
      return invalid_argument(name, "--{} needs --enable-dbo", name);
    }
  }
  if (shape.size() == 1 && options.flag("enable-dbo")) {
    return invalid_argument("enable-dbo", "--enable-dbo computes while tokens travel between ranks, but "
                                          "--data-parallel-size is 1");
  }
  if (shape.size() == 1) {
    for (const char* const name : {"headless", "data-parallel-size-local", "data-parallel-start-rank",
                                   "tensor-parallel-rank", "data-parallel-hybrid-lb"}) {
      const bool is_one = std::string_view(name) == "data-parallel-size-local" && options.integer(name) <= 1;
      if (is_one || !options.is_changed(name)) continue;
      return invalid_argument(name, "--{} is for several ranks; give --data-parallel-size or --tensor-parallel-size, or "
                                    "leave it out",
                              name);
    }
    if (!options.flag("enable-eplb")) return RankOptions{};
    return invalid_argument("enable-eplb", "--enable-eplb moves experts between ranks, but there is one rank only");
  }
  if (shape.data > 1 && !options.flag("enable-expert-parallel")) {
    return invalid_argument("enable-expert-parallel",
                            "--data-parallel-size {} needs --enable-expert-parallel; for copies of a model that have "
                            "nothing to do with each other start `tandem serve` several times and `tandem route` in front",
                            shape.data);
  }
  if (shape.data == 1) return read_group(options, shape, 0);
  return rank >= 0 ? read_group(options, shape, rank) : read_node(options, shape);
}

std::vector<std::string> rank_arguments(const Options& options, const group::GroupShape& shape, int32_t data_rank,
                                        const std::string& coordinator_host, int64_t coordinator_port) {
  std::vector<std::string> arguments{
      "--data-parallel-size", std::to_string(shape.data), "--data-parallel-rank", std::to_string(data_rank),
      "--tensor-parallel-size", std::to_string(shape.tensor), "--data-parallel-address", coordinator_host,
      "--data-parallel-rpc-port", std::to_string(coordinator_port), "--data-parallel-coordinator", "elsewhere",
      "--enable-expert-parallel", "--all2all-backend", options.text("all2all-backend"), "--dispatch-format",
      options.text("dispatch-format"), "--rank-timeout", std::to_string(options.number("rank-timeout"))};
  if (options.flag("enable-dbo")) {
    arguments.push_back("--enable-dbo");
    for (const char* const name : {"dbo-decode-token-threshold", "dbo-prefill-token-threshold"}) {
      arguments.insert(arguments.end(), {fmt::format("--{}", name), std::to_string(options.integer(name))});
    }
  }
  if (options.flag("enable-eplb")) arguments.push_back("--enable-eplb");
  if (const std::string& eplb = options.text("eplb-config"); !eplb.empty()) {
    arguments.insert(arguments.end(), {"--eplb-config", eplb});
  }
  return arguments;
}

}  // namespace tandem::commands
