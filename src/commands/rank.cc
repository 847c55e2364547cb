#include "src/commands/rank.h"

#include <unistd.h>

#include <algorithm>

#include "src/base/hash.h"
#include "src/base/log.h"
#include "src/base/memory_info.h"
#include "src/base/version.h"
#include "src/ep/limits.h"
#include "src/group/node.h"
#include "src/model/tensor_split.h"

namespace tandem::commands {
namespace {

constexpr int64_t kExpertLoadWindow = 1000;  // steps that /expert_load and the balance metrics tell of
constexpr int64_t kMostPrompts = int64_t{1} << 20;  // of --num-prompts

double mebibytes(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

std::string choose_backend(const Options& options) {
  const std::string& device = options.text("device");
  const std::string& isa = options.text("cpu-isa");
  if (device == "ref") return "ref";
  return isa == "auto" ? "auto" : "cpu-" + isa;
}

// The rank's shard of the experts and its way to the others.
Result<std::unique_ptr<ep::Exchange>> make_exchange(const RankConfig& config,
                                                    const std::optional<ep::BalancerOptions>& balancing) {
  const int64_t num_experts = config.model.moe.num_experts;
  const int32_t size = config.group->shape.size();
  const int32_t rank = config.group->rank.value;
  const int64_t slots = size * config.limits.max_num_batched_tokens * config.model.moe.router.top_k;
  if (config.limits.max_num_batched_tokens > ep::kMaxRows || slots > ep::kMaxSlotNumber) {
    return invalid_argument("max-num-batched-tokens",
                            "--max-num-batched-tokens {}: {} ranks with {} experts for each row can number {} slots; take "
                            "at most {}",
                            config.limits.max_num_batched_tokens, size, config.model.moe.router.top_k, slots,
                            std::min<int64_t>(ep::kMaxRows, ep::kMaxSlotNumber / (size * config.model.moe.router.top_k)));
  }
  model::ExpertShard shard = balancing ? ep::Balancer::initial_shard(balancing->layout, rank)
                                       : ep::make_shard(rank, size, static_cast<int32_t>(num_experts));
  log_info("serve", "rank {} of {}: experts {} … {} of {}", rank, size, shard.slots.front(), shard.slots.back(),
           num_experts);
  TANDEM_ASSIGN(const ep::All2AllChoice choice, ep::parse_all2all_backend(config.group->backend));
  if (!choice.note.empty()) log_info("serve", "{}", choice.note);
  ep::ExchangeOptions options;
  options.backend = choice.backend;
  TANDEM_ASSIGN(options.row_format, kernels::parse_row_format(config.group->dispatch_format));
  options.window_offset = group::StepAgreement::window_bytes(size);
  if (config.group->dual_batch.is_enabled) options.num_lanes = 2;
  return std::make_unique<ep::Exchange>(std::move(shard), options);
}

Status check_group_size(const group::GroupShape& shape, int64_t num_experts) {
  if (num_experts >= shape.size()) return {};
  return invalid_argument("data-parallel-size", "{} ranks cannot share {} experts; take at most {} ranks", shape.size(),
                          num_experts, num_experts);
}

Result<eplb::Layout> expert_layout(const eplb::EplbConfig& config, const group::GroupShape& shape,
                                   const model::ModelConfig& model) {
  eplb::Layout layout;
  layout.num_experts = model.moe.num_experts;
  layout.num_redundant = config.num_redundant_experts;
  layout.num_ranks = shape.size();
  layout.num_groups = std::max<int64_t>(1, model.moe.router.num_groups);
  if (Status checked = eplb::check_layout(layout); !checked.ok()) {
    return invalid_argument("eplb-config", "--eplb-config: {}", checked.error().message);
  }
  return layout;
}

// Of --enable-eplb.
Result<std::optional<ep::BalancerOptions>> read_balancing(const RankConfig& config) {
  if (!config.group->eplb) return std::optional<ep::BalancerOptions>();
  ep::BalancerOptions options;
  options.config = *config.group->eplb;
  TANDEM_ASSIGN(options.layout, expert_layout(options.config, config.group->shape, config.model));
  return std::optional<ep::BalancerOptions>(options);
}

// Whether so many ranks can share the model, as far as its config tells.
Status check_shape(const group::GroupShape& shape, const std::optional<eplb::EplbConfig>& eplb,
                   const model::ModelConfig& model) {
  if (shape.size() == 1) return {};
  TANDEM_TRY(check_group_size(shape, model.moe.num_experts));
  if (shape.tensor > 1) {
    model::ModelConfig part = model;
    TANDEM_TRY(model::split_config(part, {0, shape.tensor}));
  }
  if (!eplb) return {};
  const Result<eplb::Layout> layout = expert_layout(*eplb, shape, model);
  return layout.ok() ? Status() : Status(layout.error());
}

// Every option that a transfer sees is named as the user wrote it.
Result<std::optional<KvTransferConfig>> read_kv_transfer(const Options& options) {
  const std::string& text = options.text("kv-transfer-config");
  if (text.empty()) return std::optional<KvTransferConfig>();
  TANDEM_ASSIGN(KvTransferConfig config, parse_kv_transfer_config(text));
  if (config.engine_id.empty()) config.engine_id = random_hex(8);
  return std::optional<KvTransferConfig>(std::move(config));
}

// Whether the agent of this rank, the first of several tensor ranks, moves KV of which the others have heads.
bool lends_heads(const RankConfig& config) {
  return config.group && !config.group->is_follower() && config.group->shape.tensor > 1 && config.kv_transfer &&
         !config.kv_transfer->synthetic_fill && config.model.gqa.kv_heads > 0;
}

}  // namespace

Result<RankConfig> make_rank_config(const Options& options) {
  RankConfig config;
  group::GroupShape shape;
  std::optional<eplb::EplbConfig> eplb;
  config.backend = choose_backend(options);
  config.threads = static_cast<int>(options.integer("threads"));
  config.limits.max_num_batched_tokens = options.integer("max-num-batched-tokens");
  config.limits.max_num_seqs = options.integer("max-num-seqs");
  config.limits.max_step_us = static_cast<int64_t>(options.number("max-step-ms") * 1000);
  config.limits.block_size = options.integer("block-size");
  config.limits.prefix_caching = options.flag("enable-prefix-caching");
  if (config.limits.max_num_seqs > config.limits.max_num_batched_tokens) {
    return invalid_argument("max-num-seqs",
                            "--max-num-seqs {} is more than --max-num-batched-tokens {}: every running request needs a "
                            "row per step; lower the first or raise the second",
                            config.limits.max_num_seqs, config.limits.max_num_batched_tokens);
  }
  config.memory.num_blocks = options.integer("num-gpu-blocks-override");
  config.memory.kv_bytes = options.integer("kv-cache-memory-bytes");
  config.memory.utilization = options.number("gpu-memory-utilization");
  config.memory.fill = options.is_set("gpu-memory-utilization");
  if (options.command() == Subcommand::kServe) {
    config.limits.max_num_waiting = options.integer("max-num-waiting");
    TANDEM_ASSIGN(config.kv_transfer, read_kv_transfer(options));
    TANDEM_ASSIGN(RankOptions ranks, read_rank_options(options));
    config.group = std::move(ranks.group);
    if (ranks.node) shape = ranks.node->shape;
    if (config.group) shape = config.group->shape;
    eplb = ranks.node ? ranks.node->eplb : config.group ? config.group->eplb : std::nullopt;
    // Ranks of one host are given one configuration: each has its own port for KV.
    if (config.group && config.kv_transfer && config.kv_transfer->port != 0) {
      config.kv_transfer->port += config.group->data_rank();
    }
    config.first_token_from_decode = options.text("first-token-from") == "decode";
    config.kv_transport = *comm::parse_transport(options.text("kv-transport"));
    const std::string& sums = options.text("kv-checksum");
    config.kv_checksum = sums == "auto" ? transfer::KvChecksum::kAuto
                         : sums == "on" ? transfer::KvChecksum::kOn
                                        : transfer::KvChecksum::kOff;
    // A prefix that was found would be a benchmark of something else.
    if (config.kv_transfer && config.kv_transfer->synthetic_fill) config.limits.prefix_caching = false;
  } else {
    config.limits.max_num_waiting = kMostPrompts;  // a benchmark submits everything at once
  }

  config.load.path = options.text("model");
  config.load.format =
      options.text("load-format") == "dummy" ? model::LoadFormat::kDummy : model::LoadFormat::kSafetensors;
  config.load.compute = options.text("dtype") == "float32" ? model::ComputeType::kF32 : model::ComputeType::kBf16;
  config.load.quantization = {options.text("quantization"), options.integer("quantization-group-size"),
                              options.text("lm-head-quantization")};
  const std::string kv_dtype = options.text("kv-cache-dtype");
  config.load.kv_cache = kv_dtype == "auto"       ? model::KvCacheType::kAuto
                         : kv_dtype == "bfloat16" ? model::KvCacheType::kBf16
                                                  : model::KvCacheType::kF8E4M3;
  config.load.max_num_batched_tokens = config.limits.max_num_batched_tokens;
  config.load.max_num_seqs = config.limits.max_num_seqs;
  config.load.max_model_len = options.integer("max-model-len");
  config.load.block_size = config.limits.block_size;
  config.load.dummy_seed = static_cast<uint64_t>(options.integer("seed"));
  TANDEM_ASSIGN(config.load.simulation, model::parse_routing_simulation(options.text("moe-routing-simulation"),
                                                                        config.load.dummy_seed));
  if (options.command() != Subcommand::kBenchLatency) {
    config.expert_load_path = options.text("record-expert-load");
    config.expert_load_interval_s = options.number("record-expert-load-interval-s");
    config.load.keep_routing = !config.expert_load_path.empty();
  }
  TANDEM_ASSIGN(config.model, model::load_config(config.load.path));
  TANDEM_TRY(check_shape(shape, eplb, config.model));
  return config;
}

Result<std::unique_ptr<Rank>> Rank::load(RankConfig config, int64_t sampled_vocab, const Clock& clock,
                                         Registry& registry, std::function<void(double)> on_progress) {
  std::unique_ptr<Rank> rank(new Rank());
  rank->config_ = config;
  TANDEM_ASSIGN(rank->ops_, kernels::make_ops(config.backend, config.threads));
  log_info("serve", "kernels: {}, {} threads", rank->ops_->name(), rank->ops_->num_threads());
  config.load.on_progress = std::move(on_progress);
  TANDEM_TRY(rank->load_weights(config));
  if (config.group && config.group->is_follower()) return rank;
  TANDEM_TRY(rank->make_engine(config, sampled_vocab, clock, registry));
  TANDEM_TRY(rank->open_agent(config));
  TANDEM_TRY(rank->record_expert_load(config, registry));
  return rank;
}

Status Rank::make_engine(const RankConfig& config, int64_t sampled_vocab, const Clock& clock, Registry& registry) {
  engine::EngineOptions options;
  options.model_name = config.model_name;
  options.limits = config.limits;
  if (config.group) options.dual_batch = config.group->dual_batch;
  options.spans = config.spans;
  options.first_token_from_decode = config.first_token_from_decode;
  options.limits.rows_depend_on_role = info().rows_depend_on_role;
  options.eos_ids = config.model.generation.eos_token_ids;
  options.sampled_vocab = std::min(sampled_vocab, info().vocab_size);
  if (config.kv_transfer) {
    options.kv_role = config.kv_transfer->role;
    options.kv_host = config.kv_transfer->ip;
    options.synthetic_fill = config.kv_transfer->synthetic_fill;
  }
  engine_ = std::make_unique<engine::Engine>(*model_, *cache_, options, clock, registry);
  engine_->attach(populator_.get());
  return {};
}

// What a rank shares with the others of its data rank.
void Rank::make_tensor_rank(const GroupConfig& config) {
  const model::TensorShard shard{config.tensor_rank(), config.shape.tensor};
  const group::RankId first(config.rank.value - shard.rank);
  tensor_ = std::make_unique<tp::TensorWindows>(tp::TensorOptions{shard, first, 0});
  log_info("serve", "tensor rank {} of {} of data rank {}", shard.rank, shard.size, config.data_rank());
}

// Weights and cache; refused before any weight is read if they do not fit.
Status Rank::load_weights(const RankConfig& config) {
  model::LoadOptions load = config.load;
  if (config.group) {
    TANDEM_ASSIGN(balancing_, read_balancing(config));
    TANDEM_ASSIGN(exchange_, make_exchange(config, balancing_));
    load.exchange = exchange_.get();
    load.moves_experts = balancing_.has_value();
    if (config.group->shape.tensor > 1) {
      make_tensor_rank(*config.group);
      load.tensor = tensor_.get();
    }
  }
  int64_t num_blocks = 0;
  load.on_sized = [&](const model::MemoryNeeds& needs) -> Status {
    const AvailableMemory available = available_memory();
    TANDEM_ASSIGN(const engine::MemoryPlan plan, engine::plan_memory(needs, config.memory, available));
    num_blocks = plan.num_blocks;
    TANDEM_TRY(open_whole_cache(config, needs.kv, num_blocks));
    if (config.on_planned) {
      PlannedCache planned{num_blocks, std::nullopt};
      if (whole_cache_ != nullptr) planned.memory = {::getpid(), whole_cache_->shared_fd()};
      config.on_planned(planned);
    }
    log_info("serve",
             "memory: weights {:.0f} MiB, workspace {:.0f} MiB, KV cache {:.0f} MiB, in all {:.0f} of {:.0f} MiB "
             "available ({})",
             mebibytes(needs.weight_bytes), mebibytes(needs.workspace_bytes),
             mebibytes(num_blocks * needs.kv.total_block_bytes()), mebibytes(plan.total_bytes),
             mebibytes(available.bytes), available.limited_by);
    return {};
  };
  TANDEM_ASSIGN(model_, model::load_model(*ops_, load));
  make_cache(config, num_blocks);
  return {};
}

// Heads of which every tensor rank has some are sent and received as one rank would: all of them lie in one memory, made
// by the first rank and mapped by the others, laid out as if there were one rank.
Status Rank::open_whole_cache(const RankConfig& config, const model::KvLayout& part, int64_t num_blocks) {
  const bool lends = lends_heads(config);
  if (!lends && !(config.group && config.group->kv_memory)) return {};
  if (part.kind != model::KvKind::kGqa) {
    return invalid_argument("tensor-parallel-kv-memory",
                            "--tensor-parallel-kv-memory is for models whose KV heads are shared, this one has {}; leave it "
                            "out",
                            part.describe_token());
  }
  const int32_t ranks = config.group->shape.tensor;
  const model::KvLayout whole = part.with_heads(part.kv_heads * ranks);
  const int64_t bytes = num_blocks * whole.total_block_bytes();
  if (lends) {
    whole_cache_ = std::make_unique<model::KvCache>(*ops_, whole, num_blocks, /*shareable=*/true);
    if (whole_cache_->shared_fd() >= 0) return {};
    return make_error(ErrorKind::kUnavailable,
                      "--kv-transfer-config with --tensor-parallel-size {}: the KV of all heads must lie in one memory, and "
                      "{} with this kernel gives none of {:.0f} MiB that {} processes can map; allow memfd_create, or use "
                      "--tensor-parallel-size 1",
                      ranks, ops_->name(), mebibytes(bytes), ranks);
  }
  const SharedMemory& memory = *config.group->kv_memory;
  Result<std::unique_ptr<kernels::Buffer>> buffer = ops_->open_shared(memory.process, memory.descriptor, bytes);
  if (!buffer.ok()) {
    return make_error(buffer.error().kind, "--tensor-parallel-kv-memory {}:{}: {}", memory.process, memory.descriptor,
                      buffer.error().message);
  }
  whole_cache_ = std::make_unique<model::KvCache>(whole, num_blocks, *std::move(buffer));
  return {};
}

void Rank::make_cache(const RankConfig& config, int64_t num_blocks) {
  const model::KvLayout& layout = info().kv;
  std::string where;
  if (whole_cache_ != nullptr) {
    const model::TensorShard shard{config.group->tensor_rank(), config.group->shape.tensor};
    cache_ = std::make_unique<model::KvCache>(model::KvCache::part_of(*whole_cache_, shard));
    where = fmt::format(", part {} of {} of one memory of {:.1f} MiB", shard.rank, shard.size,
                        mebibytes(whole_cache_->bytes()));
  } else {
    const bool shareable =
        config.kv_transfer && !config.kv_transfer->synthetic_fill && comm::may_share_memory(config.kv_transport);
    cache_ = std::make_unique<model::KvCache>(*ops_, layout, num_blocks, shareable);
  }
  populator_ = std::make_unique<kv::Populator>(whole_cache_ != nullptr ? *whole_cache_ : *cache_);
  log_info("serve", "KV cache: {}, {} blocks = {} tokens in {:.1f} MiB{}; room for {:.1f} requests of {} tokens",
           layout.describe(), num_blocks, num_blocks * layout.block_size, mebibytes(cache_->bytes()), where,
           static_cast<double>(num_blocks * layout.block_size) / static_cast<double>(info().max_model_len),
           info().max_model_len);
}

Status Rank::open_agent(const RankConfig& config) {
  if (!config.kv_transfer) return {};
  if (config.kv_transfer->synthetic_fill) {
    log_warning("serve", "DecodeBenchConnector: the KV of every prompt is made up ({}), answers mean nothing",
                info().kv.dtype == kernels::DType::kF8E4M3 ? 0.0F : *config.kv_transfer->synthetic_fill);
    return {};
  }
  const KvTransferConfig& kv = *config.kv_transfer;
  if (!kv.connector_note.empty()) log_info("serve", "{}", kv.connector_note);
  transfer::AgentOptions options;
  options.engine_id = kv.engine_id;
  options.listen_host = kv.ip;
  options.listen_port = kv.port;
  options.model_fingerprint = info().fingerprint;
  options.role = kv.role;
  options.transport = config.kv_transport;
  options.checksum = config.kv_checksum;
  TANDEM_ASSIGN(agent_, transfer::make_agent(whole_cache_ == nullptr ? *cache_ : *whole_cache_, options,
                                               [this] { engine_->wake(); }));
  engine_->attach(agent_.get());
  log_info("serve", "prefill/decode: {} as {}, KV on {}:{}", kv.connector, kv_role_name(kv.role), kv.ip,
           agent_->port());
  return {};
}

Status Rank::record_expert_load(const RankConfig& config, Registry& registry) {
  if (config.expert_load_path.empty()) return {};
  expert_load_ =
      std::make_unique<engine::ExpertLoadRecorder>(info(), config.model_name, kExpertLoadWindow, registry);
  engine_->attach(expert_load_.get());
  TANDEM_ASSIGN(expert_load_file_,
                ExpertLoadFile::create(config.expert_load_path, config.expert_load_interval_s, *expert_load_));
  log_info("serve", "expert load: {} layers x {} experts into {} every {} s", info().moe_layers.size(),
           info().num_experts, config.expert_load_path, config.expert_load_interval_s);
  return {};
}

std::vector<group::Fact> Rank::group_facts() const {
  return {{"program", kVersion},
          {"model", info().fingerprint},
          {"instruction set (--cpu-isa)", ops_->name()},
          {"KV cache (--kv-cache-dtype, --block-size)", info().kv.describe()},
          {"--max-model-len", std::to_string(info().max_model_len)},
          {"--all2all-backend", config_.group->backend},
          {"--dispatch-format", config_.group->dispatch_format},
          {"--enable-dbo", config_.group->dual_batch.is_enabled ? "true" : "false"},
          {"--max-num-batched-tokens", std::to_string(config_.limits.max_num_batched_tokens)},
          {"--rank-timeout", fmt::format("{} us", config_.group->rank_timeout_us)}};
}

Status Rank::join_group(const std::string& http_address, Registry& registry) {
  const GroupConfig& config = *config_.group;
  group::MembershipOptions options;
  options.coordinator_host = config.coordinator_host;
  options.coordinator_port = config.coordinator_port;
  options.shape = config.shape;
  options.rank = config.rank;
  options.node = group::this_node();
  options.http_address = http_address;
  options.facts = group_facts();
  options.options = config.options;
  if (tensor_ != nullptr) options.facts.push_back({"--max-num-seqs", std::to_string(config_.limits.max_num_seqs)});
  options.window_bytes = exchange_->window_end();
  if (balancing_) {
    model::ExpertStore& store = *model_->expert_store();
    if (store.slot_bytes(0)[0] == 0) {
      return invalid_argument("enable-eplb", "--enable-eplb: the {} backend cannot move experts; use --device cpu",
                              ops_->name());
    }
    options.facts.push_back({"layout of the experts", Sha256().add(store.layout()).finish().hex()});
    options.facts.push_back({"--eplb-config", config.eplb->describe()});
    balancing_->layers = info().moe_layers;
    balancing_->window_offset = (options.window_bytes + 63) / 64 * 64;
    options.window_bytes = balancing_->window_offset + ep::Balancer::window_bytes(*balancing_);
    balancer_ = std::make_unique<ep::Balancer>(*balancing_, *exchange_, store, registry);
  }
  options.rank_timeout_us = config.rank_timeout_us;
  std::vector<group::FabricUser*> users{exchange_.get()};
  if (tensor_ != nullptr) {
    const auto add_part = [&](int64_t bytes) {
      const int64_t offset = (options.window_bytes + 63) / 64 * 64;
      options.window_bytes = offset + bytes;
      return offset;
    };
    tensor_->set_window_offset(add_part(tensor_->window_bytes()));
    tp::OrderOptions orders;
    orders.first = group::RankId(config.rank.value - config.tensor_rank());
    orders.num_ranks = config.shape.tensor;
    orders.window_offset = add_part(orders.ring_bytes);
    if (config.is_follower()) {
      order_receiver_ = std::make_unique<tp::OrderReceiver>(orders);
      users.insert(users.end(), {tensor_.get(), order_receiver_.get()});
    } else {
      order_sender_ = std::make_unique<tp::OrderSender>(orders);
      users.insert(users.end(), {tensor_.get(), order_sender_.get()});
    }
  }
  fabric_users_ = std::make_unique<group::FabricUsers>(std::move(users));
  TANDEM_ASSIGN(membership_, group::Membership::start(options));
  lockstep_ = std::make_unique<engine::Lockstep>(*membership_, fabric_users_.get(), registry, balancer_.get());
  if (config.is_follower()) {
    follower_ = std::make_unique<engine::Follower>(*model_, *cache_, *lockstep_, *order_receiver_);
    follower_->attach(populator_.get());
  } else {
    engine_->attach(lockstep_.get());
    engine_->attach(order_sender_.get());
  }
  return {};
}

void Rank::start() { follower_ ? follower_->start() : engine_->start(); }

void Rank::stop() {
  if (follower_) follower_->stop();
  if (engine_) engine_->stop();
}

Status Rank::group_status() const { return membership_ == nullptr ? Status() : membership_->status(); }

Rank::~Rank() {
  stop();
  expert_load_file_.reset();
  agent_.reset();
}

}  // namespace tandem::commands
