// One client request while it runs: submits its choices to a worker, turns token events into text and chunks, and sees
// to it that it ends exactly once: with an answer, an error, its deadline, or its client's leaving.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/api/choice_text.h"
#include "src/api/http_server.h"
#include "src/api/openai_request.h"
#include "src/api/openai_response.h"
#include "src/api/request_metrics.h"
#include "src/api/served_text.h"
#include "src/base/clock.h"
#include "src/engine/worker.h"

namespace tandem::api {

class Generation;

// Carries events from a worker's thread to the I/O thread. A sink holds it, so it may outlive the front end.
// Bounded by what the choices in flight may generate; the I/O thread takes everything at each turn.
class EventMailbox {
 public:
  virtual ~EventMailbox() = default;
  virtual void push(std::weak_ptr<Generation> target, size_t choice, engine::TokenEvent event) = 0;
  // A publication that its client was not told of: whoever serves now gives it back to its worker.
  virtual void give_back(const transfer::KvTransferParams& publication) = 0;
};

// What a generation uses; all that is a bare pointer outlives it.
struct GenerationContext {
  engine::Worker* worker = nullptr;
  std::shared_ptr<const ServedText> served;
  RequestMetrics* metrics = nullptr;
  const Clock* clock = nullptr;
};

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  // `choices` as make_token_requests() returns them. `on_end` is called once, at the very end.
  Generation(GenerationContext context, std::shared_ptr<HttpExchange> exchange, OpenAiRequest request,
             std::vector<engine::TokenRequest> choices, std::string request_id, int64_t arrival_us,
             std::function<void(Generation&)> on_end);

  void start(std::shared_ptr<EventMailbox> mailbox);
  // False if it came too late, when the request had ended; then the event is untouched.
  bool take(size_t choice, engine::TokenEvent&& event);
  // Ends everything with an error; the other choices are cancelled.
  void fail(const Error& error);
  int64_t deadline_us() const { return deadline_us_; }
  // Its span, as far as it is done; "cancelled" where the client has left.
  void describe(Span& span, int64_t now_us) const;

 private:
  struct Choice {
    engine::TokenRequest request;  // moved out by start(), but for the prompt where it is shown
    RequestId id;
    bool submitted = false;
    bool done = false;
    bool shown = false;  // its first chunk was sent
    int64_t max_tokens = 0;
    int64_t num_tokens = 0;
    int64_t first_token_us = 0;
    int64_t last_token_us = 0;
    int64_t text_offset = 0;
    UsageCounts usage;
    std::optional<ChoiceText> text;
    std::string whole_text;                            // not streamed
    std::vector<engine::GeneratedToken> whole_tokens;  // not streamed, where they are shown
    std::vector<TokenId> prompt;                       // where it is shown
    std::optional<engine::FinishReason> finish;
    StopReason stop_reason;
  };

  void take_tokens(size_t index, engine::TokenEvent& event);
  void finish_choice(Choice& choice, engine::FinishReason reason);
  void show_part(size_t index, std::string_view text, std::span<const engine::GeneratedToken> tokens);
  void open_stream();
  void finish_request();
  void leave();
  void cancel_choices(std::string_view reason);
  void end();
  UsageCounts total_usage() const;
  std::optional<UsageCounts> running_usage(const Choice& choice) const;

  const GenerationContext context_;
  const std::shared_ptr<HttpExchange> exchange_;
  const OpenAiRequest request_;
  const std::string request_id_;
  const int64_t arrival_us_;
  const int64_t deadline_us_;
  const ResponseWriter writer_;
  std::function<void(Generation&)> on_end_;
  std::vector<Choice> choices_;
  size_t num_done_ = 0;
  bool stream_open_ = false;
  bool ended_ = false;
  std::string kv_transfer_;  // JSON of a publication (or, not streamed, a reservation)
  std::optional<transfer::KvTransferParams> publication_;
  std::shared_ptr<EventMailbox> mailbox_;
  std::string error_;        // why it failed
};

}  // namespace tandem::api
