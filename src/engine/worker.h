// A Worker takes token requests and streams token events. Engine (this folder) is a queue to this process's engine;
// RoutedWorker (src/router) speaks HTTP to other processes. The front end (src/api) knows only this interface.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/base/trace.h"
#include "src/transfer/params.h"

namespace tandem::engine {

// Error::code of a leg that its worker cannot take because of the prompt's length, though it could compute the prompt
// alone.
inline constexpr const char* kNoRoom = "kv_transfer_no_room";

// Ranges are checked by src/api before a request is submitted.
struct SamplingParams {
  int64_t max_tokens = 16;   // >= 1
  int64_t min_tokens = 0;    // eos and stop ids cannot be chosen before
  double temperature = 1.0;  // 0: greedy
  int64_t top_k = 0;         // 0: off
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;  // over prompt and output
  double presence_penalty = 0.0;    // over output
  double frequency_penalty = 0.0;   // over output
  uint64_t seed = 0;                // always set: the front end draws one when the client gave none
  std::vector<std::pair<TokenId, float>> logit_bias;
  std::vector<TokenId> stop_token_ids;  // besides the model's eos ids
  bool ignore_eos = false;
  int64_t num_logprobs = -1;  // -1: none; 0: of the chosen token; k: and of the k best
};

enum class FinishReason : uint8_t { kStop, kLength, kAbort, kError };
const char* finish_reason_name(FinishReason reason);  // "stop", "length", "abort", "error"

struct TokenRequest {
  std::string external_id;      // X-Request-Id, for logs and for both legs
  std::vector<TokenId> prompt;  // 1 … max_model_len - 1 ids, each < vocab size
  SamplingParams sampling;
  std::string cache_salt;   // prefixes are shared only among equal salts
  int64_t deadline_us = 0;  // on SteadyClock; 0: none
  std::optional<transfer::KvTransferParams> kv_transfer;
  // Tokens that another worker has generated for this request before it went away: the answer goes on behind them, as
  // after a preemption. They count in max_tokens, min_tokens and penalties, and no event carries them again.
  std::vector<TokenId> resumed;
  bool is_one_of_several = false;  // of the choices of one request (n > 1)
  std::string session;             // for a router's session policy; "" for none
  std::string prefiller;           // for a router: "host:port" of the prefill worker that the client names; "" for none
  int32_t pinned_rank = -1;        // of a rank group: the only one that may compute it; -1: any
  TraceContext trace{};            // the span of this request; not valid: nobody traces
};

struct GeneratedToken {
  TokenId token = 0;
  float logprob = 0;                                    // valid if num_logprobs >= 0; natural log, before temperature
  std::vector<std::pair<TokenId, float>> top_logprobs;  // best first; num_logprobs of them
};

struct TokenUsage {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt, from a prefix cache
};

// Part of one request's answer. The last event of a request has `finish` or `error`; none follows it.
struct TokenEvent {
  std::vector<GeneratedToken> tokens;
  std::optional<FinishReason> finish;
  std::optional<TokenId> stop_token;  // which id ended it, when kStop
  std::optional<Error> error;
  std::optional<transfer::KvTransferParams> kv_transfer;  // a reservation (first event) or a publication (last event)
  TokenUsage usage;                                       // valid in every event with tokens or finish
};

// Called on the worker's own thread, in order; must not block and must not call back into the worker.
using EventSink = std::function<void(TokenEvent&&)>;

class Worker {
 public:
  virtual ~Worker() = default;
  // Starts a request; every event goes to `sink`. The id is for cancel().
  virtual RequestId submit(TokenRequest request, EventSink sink) = 0;
  // The client has left: no event follows, resources are freed at once. Unknown or finished ids are ignored.
  virtual void cancel(RequestId id) = 0;
  // Nobody comes for what a request has published here (TokenEvent::kv_transfer of its last event), so its blocks need
  // not wait for the end of the lease; whoever fetches them just now hears that it is over. The publication is named by
  // remote_engine_id and remote_request_id; one that is unknown, or has ended, is ignored. From any thread.
  virtual void release(const transfer::KvTransferParams& publication) = 0;
};

}  // namespace tandem::engine
