#include "src/engine/probe.h"

namespace tandem::engine {
namespace {

MetricLabels base_labels(const EngineFacts& facts) { return {{"model_name", facts.model_name}, {"engine", "0"}}; }

MetricLabels with(const EngineFacts& facts, const char* key, const char* value) {
  MetricLabels labels = base_labels(facts);
  labels.emplace_back(key, value);
  return labels;
}

constexpr std::string_view kFaultPrefix = "kv_transfer_";  // of Error::code (src/transfer/wire.h)
constexpr const char* kBySourceHelp = "Prompt tokens by where their KV came from.";
constexpr const char* kTransfersHelp = "KV transfers that ended, by direction and outcome.";

}  // namespace

Probe::Probe(Registry& registry, const EngineFacts& facts)
    : running_(registry.gauge("vllm:num_requests_running", "Requests in the running batch.", base_labels(facts))),
      waiting_(registry.gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.", base_labels(facts))),
      receiving_(registry.gauge("tandem:num_requests_waiting_for_kv", "Requests waiting for KV from prefill.",
                                base_labels(facts))),
      kv_usage_(registry.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", base_labels(facts))),
      blocks_available_(registry.gauge("tandem:kv_blocks_available", "KV blocks that are free or merely cached.",
                                       base_labels(facts))),
      blocks_pinned_(
          registry.gauge("tandem:kv_blocks_pinned", "Holds of open transfers on KV blocks.", base_labels(facts))),
      prefix_queries_(registry.counter("vllm:prefix_cache_queries_total",
                                       "Prompt tokens looked up in the prefix cache.", base_labels(facts))),
      prefix_hits_(registry.counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
                                    base_labels(facts))),
      preemptions_(registry.counter("vllm:num_preemptions_total",
                                    "Sequences that gave their blocks back to wait again.", base_labels(facts))),
      corrupted_(registry.counter("vllm:corrupted_requests_total", "Requests that failed with NaN logits.",
                                  base_labels(facts))),
      prompt_tokens_(registry.counter("vllm:prompt_tokens_total", "Prompt tokens processed.", base_labels(facts))),
      prompt_tokens_cached_(registry.counter("vllm:prompt_tokens_cached_total", "Prompt tokens served from a cache.",
                                             base_labels(facts))),
      prompt_from_compute_(registry.counter("vllm:prompt_tokens_by_source_total", kBySourceHelp,
                                            with(facts, "source", "local_compute"))),
      prompt_from_cache_(registry.counter("vllm:prompt_tokens_by_source_total", kBySourceHelp,
                                          with(facts, "source", "local_cache_hit"))),
      prompt_from_transfer_(registry.counter("vllm:prompt_tokens_by_source_total", kBySourceHelp,
                                             with(facts, "source", "external_kv_transfer"))),
      generation_tokens_(registry.counter("vllm:generation_tokens_total", "Tokens generated.", base_labels(facts))),
      iteration_tokens_(registry.histogram("vllm:iteration_tokens_total", "Rows computed per step.",
                                           iteration_token_buckets(), base_labels(facts))),
      step_seconds_(
          registry.histogram("tandem:step_seconds", "Duration of a step.", inter_token_buckets(), base_labels(facts))),
      queue_seconds_(registry.histogram("vllm:request_queue_time_seconds", "Time from arrival to the first step.",
                                        request_latency_buckets(), base_labels(facts))),
      prefill_seconds_(registry.histogram("vllm:request_prefill_time_seconds",
                                          "Time from the first step to the first token.", request_latency_buckets(),
                                          base_labels(facts))),
      decode_seconds_(registry.histogram("vllm:request_decode_time_seconds", "Time from the first token to the last.",
                                         request_latency_buckets(), base_labels(facts))),
      inference_seconds_(registry.histogram("vllm:request_inference_time_seconds",
                                            "Time from the first step to the last token.", request_latency_buckets(),
                                            base_labels(facts))),
      sent_ok_(registry.counter("tandem:kv_transfers_total", kTransfersHelp, with(facts, "outcome", "sent"))),
      sent_failed_(
          registry.counter("tandem:kv_transfers_total", kTransfersHelp, with(facts, "outcome", "send_failed"))),
      received_ok_(registry.counter("tandem:kv_transfers_total", kTransfersHelp, with(facts, "outcome", "received"))),
      received_failed_(
          registry.counter("tandem:kv_transfers_total", kTransfersHelp, with(facts, "outcome", "receive_failed"))),
      transfer_bytes_(registry.counter("tandem:kv_transfer_bytes_total", "KV bytes of transfers that ended well.",
                                       base_labels(facts))),
      transfer_seconds_(registry.histogram("tandem:kv_transfer_seconds", "Duration of KV transfers that ended well.",
                                           time_to_first_token_buckets(), base_labels(facts))),
      num_blocks_(facts.num_blocks),
      registry_(registry),
      labels_(base_labels(facts)) {
  MetricLabels labels = base_labels(facts);
  labels.emplace_back("block_size", std::to_string(facts.block_size));
  labels.emplace_back("num_gpu_blocks", std::to_string(facts.num_blocks));
  labels.emplace_back("cache_dtype", facts.cache_dtype);
  labels.emplace_back("enable_prefix_caching", facts.prefix_caching ? "True" : "False");
  registry.gauge("vllm:cache_config_info", "Settings of the KV cache as labels.", labels).set(1);
}

void Probe::set_load(int64_t running, int64_t waiting, int64_t receiving) {
  running_.set(static_cast<double>(running));
  waiting_.set(static_cast<double>(waiting));
  receiving_.set(static_cast<double>(receiving));
}

void Probe::set_blocks(int64_t available, int64_t pinned) {
  blocks_available_.set(static_cast<double>(available));
  blocks_pinned_.set(static_cast<double>(pinned));
  kv_usage_.set(1.0 - static_cast<double>(available) / static_cast<double>(num_blocks_));
}

void Probe::prefix_lookup(int64_t queried_tokens, int64_t hit_tokens) {
  prefix_queries_.add(static_cast<uint64_t>(queried_tokens));
  prefix_hits_.add(static_cast<uint64_t>(hit_tokens));
}

void Probe::prompt_done(int64_t prompt_tokens, int64_t cached_tokens, bool from_transfer) {
  prompt_tokens_.add(static_cast<uint64_t>(prompt_tokens));
  prompt_tokens_cached_.add(static_cast<uint64_t>(cached_tokens));
  prompt_from_cache_.add(static_cast<uint64_t>(cached_tokens));
  (from_transfer ? prompt_from_transfer_ : prompt_from_compute_)
      .add(static_cast<uint64_t>(prompt_tokens - cached_tokens));
}

void Probe::finished(int64_t decode_us, int64_t inference_us) {
  decode_seconds_.observe(static_cast<double>(decode_us) * 1e-6);
  inference_seconds_.observe(static_cast<double>(inference_us) * 1e-6);
}

const std::string& Probe::count_as(const std::string& peer) {
  static const std::string other = "other";
  if (peers_.contains(peer)) return peer;
  if (peers_.size() >= kMaxPeers) return other;
  return *peers_.insert(peer).first;
}

void Probe::transfer_done(bool sent, const Status& status, int64_t bytes, int64_t duration_us,
                          const std::string& peer) {
  if (!status.ok()) {
    (sent ? sent_failed_ : received_failed_).add();
    MetricLabels labels = labels_;
    labels.emplace_back("direction", sent ? "send" : "receive");
    const Error& error = status.error();
    const bool is_fault = error.code.starts_with(kFaultPrefix);
    labels.emplace_back("cause", is_fault ? error.code.substr(kFaultPrefix.size()) : error_kind_name(error.kind));
    labels.emplace_back("peer", count_as(peer));
    registry_.counter("tandem:kv_transfer_failures_total", "KV transfers that failed, by direction, cause and peer.", labels)
        .add();
    return;
  }
  (sent ? sent_ok_ : received_ok_).add();
  transfer_bytes_.add(static_cast<uint64_t>(bytes));
  transfer_seconds_.observe(static_cast<double>(duration_us) * 1e-6);
}

}  // namespace tandem::engine
