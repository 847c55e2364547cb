// A token request as vLLM's /v1/completions call, and its answer back as token events. Pure text work, no sockets.
// Token ids travel in both directions (`prompt` as ids, `return_token_ids`), so no worker needs a tokenizer.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "src/base/result.h"
#include "src/engine/worker.h"
#include "src/router/chunk_scan.h"

namespace tandem::router {

// Decode's body: streamed, all sampling parameters. `transfer` is the kv_transfer_params object as JSON text or "".
std::string decode_body(const engine::TokenRequest& request, std::string_view transfer);
// Prefill's body: one token, not streamed; sampling as for decode, since that token is the answer's first in a push.
std::string prefill_body(const engine::TokenRequest& request, std::string_view transfer);

// The error that a worker's non-2xx response stands for. `body` is OpenAI's {"error":{…}} or anything else.
Error error_of_response(int status, std::string_view body);

// Tells a worker that nobody comes for a publication: of the kv_transfer_params object that it gave, what names it.
std::string release_body(std::string_view transfer);

// kv_transfer_params of a whole (not streamed) response as JSON text, "" if there is none.
Result<std::string> read_prefill_response(std::string_view body);

// Reads the data of one stream's server-sent events in order.
class CompletionReader {
 public:
  CompletionReader(int64_t prompt_tokens, int64_t num_logprobs)
      : prompt_tokens_(prompt_tokens), num_logprobs_(num_logprobs) {}

  // At most one of `error` and the others is set.
  struct Update {
    std::string transfer;                     // kv_transfer_params as JSON text, "" if absent
    std::optional<engine::TokenEvent> event;  // tokens, finish, or both
    std::optional<Error> error;
  };
  Update read(std::string_view data);

 private:
  Update read_chunk(std::string_view data);
  std::optional<engine::TokenEvent> take(ChunkFields fields);

  int64_t prompt_tokens_;
  int64_t num_logprobs_;
  engine::TokenUsage usage_;
  TokenId last_token_ = -1;
  // A server without continuous usage sends the counts after the finish; the finish waits for them.
  std::optional<engine::TokenEvent> waiting_finish_;
};

}  // namespace tandem::router
