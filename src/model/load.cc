#include <algorithm>
#include <new>
#include <utility>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/model/decoder.h"
#include "src/model/memory_needs.h"
#include "src/model/sources.h"
#include "src/model/tensor_split.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::kBf16Weights;
using kernels::kF32Weights;

// Bounds of what a command line may ask for.
constexpr int64_t kMaxBatchedTokens = int64_t{1} << 20;
constexpr int64_t kMaxSeqs = int64_t{1} << 16;
constexpr int64_t kMaxBlockSize = 1024;

Status check_range(const char* option, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return {};
  return invalid_argument(option, "--{} is {}, must be from {} to {}", option, value, min, max);
}

// A checkpoint may hold layers beyond num_hidden_layers only if they are MTP layers, which have an eh_proj.
Status check_layer_count(const Checkpoint& checkpoint, const ModelConfig& config) {
  for (int64_t layer = config.num_layers; layer <= checkpoint.last_layer(); ++layer) {
    if (checkpoint.find(fmt::format("model.layers.{}.eh_proj.weight", layer)) != nullptr) continue;
    return make_error(
        ErrorKind::kInvalidArgument,
        "{}: num_hidden_layers is {}, but {} holds tensors of layer {}; check that config.json belongs to "
        "these weights",
        config.path, config.num_layers, checkpoint.directory(), checkpoint.last_layer());
  }
  return {};
}

Result<std::unique_ptr<WeightSource>> open_source(const LoadOptions& options, const ModelConfig& config) {
  if (options.format == LoadFormat::kDummy) return make_dummy_source(options.dummy_seed);
  TANDEM_ASSIGN(std::unique_ptr<Checkpoint> checkpoint, open_matching_checkpoint(options.path, config));
  return make_checkpoint_source(std::move(checkpoint), config.quant);
}

// Before anything slow: what the weights are and what becomes of them.
void log_formats(const ModelConfig& config, const LoadOptions& options, const WeightPlan& plan) {
  std::string source = "dummy";
  if (options.format != LoadFormat::kDummy) source = fmt::format("checkpoint ({})", config.quant.method_name());
  std::string note;
  const QuantizationRequest& asked = options.quantization;
  if ((asked.name == "wint4" || asked.name == "w4a8") && asked.lm_head == "auto") {
    note = config.tied_embeddings ? "; the head is the embedding"
                                  : "; the head has 8 bits unless --lm-head-quantization is int4";
  }
  log_info("model", "weights: {}, --quantization {}: {}{}", source, asked.name, plan.describe_formats(), note);
  if (config.quant.has_kv_scales) {
    log_info("model",
             "the checkpoint's scales of keys and values (kv_cache_scheme) are not used: --kv-cache-dtype fp8 "
             "computes one per token and head");
  }
}

// How the scales of integer weights lie in memory.
std::string describe_scales(const LoadedWeights& loaded) {
  const int64_t total = loaded.num_f16_scaled + loaded.num_f32_scaled;
  if (total == 0) return "";
  if (loaded.num_f32_scaled == 0) return ", scales f16";
  if (loaded.num_f16_scaled == 0) return ", scales f32";
  return fmt::format(", scales f16 ({} of {} weights: f32)", loaded.num_f32_scaled, total);
}

void log_loaded(const ModelConfig& config, const ModelInfo& info, const LoadedWeights& loaded, double seconds) {
  log_info("model", "loaded {}: {} layers, {} experts, {:.1f} M parameters in {:.1f} MiB{}, KV {}, in {:.2f} s",
           config.architecture, config.num_layers, config.moe.num_experts,
           static_cast<double>(info.num_parameters) / 1e6, static_cast<double>(info.weight_bytes) / (1 << 20),
           describe_scales(loaded), info.kv.describe(), seconds);
}

void set_moe_facts(const ModelConfig& config, ModelInfo& info) {
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.layer_is_moe[static_cast<size_t>(layer)]) info.moe_layers.push_back(layer);
  }
  if (info.moe_layers.empty()) return;
  info.num_experts = config.moe.num_experts;
  info.experts_per_token = config.moe.router.top_k;
}

Status check_has_experts(const ModelConfig& config, const LoadOptions& options) {
  const bool has_experts =
      std::find(config.layer_is_moe.begin(), config.layer_is_moe.end(), true) != config.layer_is_moe.end();
  if (has_experts || (!options.keep_routing && !options.simulation.is_on())) return {};
  const char* const option = options.simulation.is_on() ? "moe-routing-simulation" : "record-expert-load";
  return invalid_argument(option, "--{}: \"{}\" has no routed experts; leave the option out", option,
                          printable(config.path));
}

DType choose_kv_dtype(const LoadOptions& options) {
  if (options.kv_cache == KvCacheType::kF8E4M3) return DType::kF8E4M3;
  return options.kv_cache == KvCacheType::kAuto && options.compute == ComputeType::kF32 ? DType::kF32 : DType::kBf16;
}

// fp8 latents lie before bf16 values of k_pe, which must begin at an even address.
Status check_kv_dtype(const ModelConfig& config, DType dtype) {
  if (dtype != DType::kF8E4M3 || config.mla.kv_lora_rank % 2 == 0) return {};
  return invalid_argument("kv-cache-dtype",
                          "--kv-cache-dtype fp8 needs an even kv_lora_rank, but \"{}\" has {}; use auto",
                          printable(config.path), config.mla.kv_lora_rank);
}

Result<std::unique_ptr<Model>> load_decoder(kernels::Ops& ops, const LoadOptions& options) {
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  TANDEM_TRY(check_range("max-num-batched-tokens", options.max_num_batched_tokens, 1, kMaxBatchedTokens));
  TANDEM_TRY(check_range("max-num-seqs", options.max_num_seqs, 1, kMaxSeqs));
  TANDEM_TRY(check_range("block-size", options.block_size, 1, kMaxBlockSize));
  TANDEM_ASSIGN(ModelConfig config, load_config(options.path));
  TANDEM_TRY(check_range("max-model-len", options.max_model_len, 0, config.max_positions));
  const DType kv_dtype = choose_kv_dtype(options);
  TANDEM_TRY(check_kv_dtype(config, kv_dtype));
  TANDEM_TRY(check_has_experts(config, options));
  TANDEM_ASSIGN(const std::shared_ptr<const WeightSource> source, open_source(options, config));

  const bool is_f32 = options.compute == ComputeType::kF32;
  TANDEM_ASSIGN(WeightFormats formats,
                choose_formats(options.quantization, config.quant, options.format == LoadFormat::kDummy,
                               !config.tied_embeddings, is_f32 ? kF32Weights : kBf16Weights));
  if (options.tensor != nullptr) {
    const TensorShard shard = options.tensor->shard();
    TANDEM_TRY(split_config(config, shard));
    if (shard.rank == 0 && !config.tied_embeddings && config.vocab_size % shard.size != 0) {
      log_info("model",
               "output head: {} rows are no multiple of --tensor-parallel-size {}, so tensor rank 0 has all of them",
               config.vocab_size, shard.size);
    }
  }
  std::unique_ptr<Decoder> decoder = std::make_unique<Decoder>(ops, std::move(config));
  decoder->set_exchange(options.exchange);
  decoder->set_tensor(options.tensor);
  if (options.moves_experts) decoder->keep_source(source, formats);
  WeightPlan plan(ops, decoder->stream(), *source, std::move(formats));
  plan.set_shard(decoder->config().tensor);
  decoder->list_weights(plan);
  TANDEM_TRY(plan.status());
  log_formats(decoder->config(), options, plan);
  const int64_t max_model_len = options.max_model_len == 0 ? decoder->config().max_positions : options.max_model_len;
  const Capacity capacity{options.max_num_batched_tokens, options.max_num_seqs, max_model_len};
  if (options.on_sized) {
    MemoryNeeds needs;
    count_weights(plan, needs);
    needs.workspace_bytes = workspace_bytes(decoder->config(), capacity, options.keep_routing);
    if (options.exchange != nullptr) {
      needs.workspace_bytes += options.exchange->extra_bytes(ops, decoder->exchange_shape(capacity));
    }
    if (options.tensor != nullptr) {
      needs.workspace_bytes += options.tensor->extra_bytes(decoder->tensor_shape(capacity));
    }
    if (options.moves_experts) {  // spares for the experts of one layer
      const std::vector<bool>& is_moe = decoder->config().layer_is_moe;
      needs.workspace_bytes += needs.expert_bytes / std::max<int64_t>(1, std::count(is_moe.begin(), is_moe.end(), true));
    }
    needs.max_model_len = max_model_len;
    needs.kv = decoder->make_kv_layout(options.block_size, kv_dtype);
    TANDEM_TRY(options.on_sized(needs));
  }
  Sha256 fingerprint;
  fingerprint.add(decoder->config().canonical_json);
  fingerprint.add(plan.describe_formats());
  // Its KV is another model's.
  if (options.simulation.is_on()) fingerprint.add("routing " + options.simulation.describe());
  TANDEM_ASSIGN(const LoadedWeights loaded, plan.load(fingerprint, options.on_progress));

  ModelInfo info;
  info.architecture = decoder->config().architecture;
  info.vocab_size = decoder->config().vocab_size;
  info.max_model_len = max_model_len;
  info.weight_bytes = loaded.bytes;
  info.expert_bytes = loaded.expert_bytes;
  info.lookup_bytes = decoder->config().tied_embeddings ? 0 : loaded.embedding_bytes;
  info.num_parameters = loaded.num_parameters;
  set_moe_facts(decoder->config(), info);
  info.fingerprint = fingerprint.finish().hex();
  if (options.simulation.is_on()) {
    log_warning("model", "--moe-routing-simulation {}: routers are simulated, so answers are nonsense",
                options.simulation.describe());
  }
  decoder->set_routing(options.keep_routing, options.simulation);
  decoder->allocate(capacity, options.block_size, kv_dtype, std::move(info));
  log_loaded(decoder->config(), decoder->info(), loaded, static_cast<double>(clock.now_us() - start_us) / 1e6);
  return std::unique_ptr<Model>(std::move(decoder));
}

}  // namespace

Result<std::unique_ptr<Checkpoint>> open_matching_checkpoint(const std::string& path, const ModelConfig& config) {
  TANDEM_ASSIGN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::open(path));
  TANDEM_TRY(check_layer_count(*checkpoint, config));
  return checkpoint;
}

Result<std::unique_ptr<Model>> load_model(kernels::Ops& ops, const LoadOptions& options) {
  try {
    return load_decoder(ops, options);
  } catch (const std::bad_alloc&) {
    return make_error(ErrorKind::kUnavailable,
                      "{}: not enough memory to load the model; use a smaller model or a machine with more",
                      options.path);
  }
}

}  // namespace tandem::model
