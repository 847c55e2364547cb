// All metrics of the engine, under vLLM's names where vLLM has one; the rest under "tandem:". Request-level metrics
// (latencies a client sees, finish reasons) belong to the front end.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "src/base/metrics.h"
#include "src/base/result.h"

namespace tandem::engine {

struct EngineFacts {
  std::string model_name;
  int64_t block_size = 0;
  int64_t num_blocks = 0;
  std::string cache_dtype;
  bool prefix_caching = true;
};

class Probe {
 public:
  Probe(Registry& registry, const EngineFacts& facts);

  void set_load(int64_t running, int64_t waiting, int64_t receiving);
  void set_blocks(int64_t available, int64_t pinned);
  void step(int64_t num_tokens, int64_t duration_us) {
    iteration_tokens_.observe(static_cast<double>(num_tokens));
    step_seconds_.observe(static_cast<double>(duration_us) * 1e-6);
  }
  void prefix_lookup(int64_t queried_tokens, int64_t hit_tokens);
  void prompt_done(int64_t prompt_tokens, int64_t cached_tokens, bool from_transfer);
  void tokens_generated(int64_t count) { generation_tokens_.add(static_cast<uint64_t>(count)); }
  void preempted() { preemptions_.add(); }
  void corrupted() { corrupted_.add(); }
  void queue_time(int64_t duration_us) { queue_seconds_.observe(static_cast<double>(duration_us) * 1e-6); }
  void prefill_time(int64_t duration_us) { prefill_seconds_.observe(static_cast<double>(duration_us) * 1e-6); }
  void finished(int64_t decode_us, int64_t inference_us);
  // A failed one is counted by its cause, which is the fault that a peer or a lease gave it ("expired", "consumed", …) or
  // the kind of its error ("aborted", "unavailable", …), and by `peer`.
  void transfer_done(bool sent, const Status& status, int64_t bytes, int64_t duration_us, const std::string& peer);

  // Peers that have counters of their own, those that failed first; all further ones together are "other".
  static constexpr size_t kMaxPeers = 64;

 private:
  const std::string& count_as(const std::string& peer);
  Gauge& running_;
  Gauge& waiting_;
  Gauge& receiving_;
  Gauge& kv_usage_;
  Gauge& blocks_available_;
  Gauge& blocks_pinned_;
  Counter& prefix_queries_;
  Counter& prefix_hits_;
  Counter& preemptions_;
  Counter& corrupted_;
  Counter& prompt_tokens_;
  Counter& prompt_tokens_cached_;
  Counter& prompt_from_compute_;
  Counter& prompt_from_cache_;
  Counter& prompt_from_transfer_;
  Counter& generation_tokens_;
  Histogram& iteration_tokens_;
  Histogram& step_seconds_;
  Histogram& queue_seconds_;
  Histogram& prefill_seconds_;
  Histogram& decode_seconds_;
  Histogram& inference_seconds_;
  Counter& sent_ok_;
  Counter& sent_failed_;
  Counter& received_ok_;
  Counter& received_failed_;
  Counter& transfer_bytes_;
  Histogram& transfer_seconds_;
  int64_t num_blocks_;
  Registry& registry_;
  std::set<std::string> peers_;
  const MetricLabels labels_;
};

}  // namespace tandem::engine
