#include "src/api/generation.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "src/base/log.h"

namespace tandem::api {
namespace {

double seconds_between(int64_t begin_us, int64_t end_us) { return static_cast<double>(end_us - begin_us) * 1e-6; }

std::string response_id(const OpenAiRequest& request, const std::string& request_id) {
  return (request.endpoint == Endpoint::kChat ? "chatcmpl-" : "cmpl-") + request_id;
}

}  // namespace

Generation::Generation(GenerationContext context, std::shared_ptr<HttpExchange> exchange, OpenAiRequest request,
                       std::vector<engine::TokenRequest> choices, std::string request_id, int64_t arrival_us,
                       std::function<void(Generation&)> on_end)
    : context_(context),
      exchange_(std::move(exchange)),
      request_(std::move(request)),
      request_id_(std::move(request_id)),
      arrival_us_(arrival_us),
      deadline_us_(choices.front().deadline_us),
      writer_(request_, response_id(request_, request_id_), unix_time_s(),
              [tokenizer = context.served->tokenizer](TokenId token) { return tokenizer->token_bytes(token); }),
      on_end_(std::move(on_end)) {
  for (engine::TokenRequest& choice_request : choices) {
    Choice& choice = choices_.emplace_back();
    choice.max_tokens = choice_request.sampling.max_tokens;
    choice.usage.prompt_tokens = static_cast<int64_t>(choice_request.prompt.size());
    // Not for a router (detokenize is false): it has the prompt, which as text may be longer than a stream may buffer.
    if (request_.return_token_ids && request_.detokenize) choice.prompt = choice_request.prompt;
    if (request_.detokenize) choice.text.emplace(*context_.served->tokenizer, request_);
    choice.request = std::move(choice_request);
  }
}

void Generation::start(std::shared_ptr<EventMailbox> mailbox) {
  mailbox_ = mailbox;
  context_.metrics->started(request_.n, choices_.front().max_tokens);
  exchange_->on_disconnect([self = shared_from_this()] { self->leave(); });
  for (size_t i = 0; i < choices_.size(); ++i) {
    choices_[i].submitted = true;
    choices_[i].id = context_.worker->submit(std::move(choices_[i].request),
                                             [mailbox, weak = weak_from_this(), i](engine::TokenEvent&& event) {
                                               mailbox->push(weak, i, std::move(event));
                                             });
  }
}

bool Generation::take(size_t index, engine::TokenEvent&& event) {
  if (ended_ || choices_[index].done) return false;  // what was on its way when it was cancelled
  if (event.error) {
    fail(*event.error);
    return true;
  }
  if (event.kv_transfer) {
    kv_transfer_ = transfer::to_json(*event.kv_transfer).dump();
    const bool is_reservation = event.tokens.empty() && !event.finish;
    if (is_reservation && request_.stream) {
      open_stream();
      exchange_->write(writer_.bare_chunk(std::nullopt, kv_transfer_));
      kv_transfer_.clear();
    }
    if (event.finish) publication_ = event.kv_transfer;
  }
  if (!ended_ && (!event.tokens.empty() || event.finish)) take_tokens(index, event);
  return true;
}

void Generation::take_tokens(size_t index, engine::TokenEvent& event) {
  Choice& choice = choices_[index];
  const int64_t now_us = context_.clock->now_us();
  if (event.usage.prompt_tokens > 0) choice.usage.prompt_tokens = event.usage.prompt_tokens;
  choice.usage.cached_tokens = event.usage.cached_tokens;

  std::string text;
  size_t num_used = 0;
  std::optional<engine::FinishReason> finish = event.finish;
  for (const engine::GeneratedToken& token : event.tokens) {
    ++num_used;
    ++choice.num_tokens;
    const bool is_last = num_used == event.tokens.size();
    const bool ends_it = is_last && event.finish == engine::FinishReason::kStop && event.stop_token == token.token;
    if (!choice.text || (ends_it && !request_.include_stop_str_in_output)) continue;
    const bool may_stop = choice.num_tokens > request_.sampling.min_tokens;
    if (std::optional<std::string> stop = choice.text->push(token.token, may_stop, text)) {
      choice.stop_reason = std::move(*stop);
      finish = engine::FinishReason::kStop;
      // The worker knows nothing of stop strings. If it has finished by itself, it ignores the id.
      context_.worker->cancel(choice.id);
      break;
    }
  }
  choice.usage.completion_tokens = choice.num_tokens;
  const bool string_matched = std::holds_alternative<std::string>(choice.stop_reason);
  if (finish && choice.text && !string_matched) {
    const bool may_stop = choice.num_tokens > request_.sampling.min_tokens;
    if (std::optional<std::string> stop = choice.text->finish(may_stop, text)) {
      choice.stop_reason = std::move(*stop);
      finish = engine::FinishReason::kStop;
    }
  }
  if (num_used > 0) {
    if (choice.num_tokens == static_cast<int64_t>(num_used)) {
      choice.first_token_us = now_us;
      context_.metrics->first_token(seconds_between(arrival_us_, now_us));
    } else {
      context_.metrics->next_tokens(seconds_between(choice.last_token_us, now_us), num_used);
    }
    choice.last_token_us = now_us;
  }
  if (finish) {
    const std::vector<TokenId>& eos = context_.served->model.eos_ids;
    const std::vector<TokenId>& asked = request_.sampling.stop_token_ids;
    if (event.stop_token && std::holds_alternative<std::monostate>(choice.stop_reason) &&
        (std::find(eos.begin(), eos.end(), *event.stop_token) == eos.end() ||
         std::find(asked.begin(), asked.end(), *event.stop_token) != asked.end())) {
      choice.stop_reason = *event.stop_token;
    }
    finish_choice(choice, *finish);
  }
  event.tokens.resize(num_used);
  if (request_.stream) {
    open_stream();
    show_part(index, text, event.tokens);
  } else {
    choice.whole_text += text;
    if (request_.sampling.num_logprobs >= 0 || request_.return_token_ids) {
      std::move(event.tokens.begin(), event.tokens.end(), std::back_inserter(choice.whole_tokens));
    }
  }
  if (!ended_ && num_done_ == choices_.size()) finish_request();
}

void Generation::finish_choice(Choice& choice, engine::FinishReason reason) {
  choice.finish = reason;
  choice.done = true;
  ++num_done_;
  const int64_t now_us = context_.clock->now_us();
  context_.metrics->ended(engine::finish_reason_name(reason), seconds_between(arrival_us_, now_us),
                          seconds_between(choice.first_token_us, choice.last_token_us), choice.usage.prompt_tokens,
                          choice.num_tokens);
}

void Generation::open_stream() {
  if (stream_open_ || ended_) return;
  stream_open_ = true;
  HttpResponse head;
  head.content_type = "text/event-stream; charset=utf-8";
  head.headers = {{"Cache-Control", "no-cache"}, {"X-Request-Id", request_id_}};
  exchange_->start_stream(std::move(head));
}

// Writing may cut a client that does not read, which ends this request inside the call.
void Generation::show_part(size_t index, std::string_view text, std::span<const engine::GeneratedToken> tokens) {
  Choice& choice = choices_[index];
  std::string out;
  if (!choice.shown && request_.endpoint == Endpoint::kChat) {
    out = writer_.role_chunk(static_cast<int64_t>(index), choice.prompt, running_usage(choice));
  }
  ChoicePart part;
  part.index = static_cast<int64_t>(index);
  part.text = text;
  part.tokens = tokens;
  part.finish = choice.finish;
  part.stop_reason = choice.stop_reason;
  if (!choice.shown) part.prompt = choice.prompt;
  const std::string_view kv_transfer = choice.finish ? std::string_view(kv_transfer_) : std::string_view();
  out += writer_.chunk(part, choice.text_offset, running_usage(choice), kv_transfer);
  choice.shown = true;
  exchange_->write(out);
}

std::optional<UsageCounts> Generation::running_usage(const Choice& choice) const {
  if (!request_.continuous_usage_stats) return std::nullopt;
  return choice.usage;
}

// A prompt is counted once, however many choices it has.
UsageCounts Generation::total_usage() const {
  UsageCounts total;
  for (size_t i = 0; i < choices_.size(); ++i) {
    total.completion_tokens += choices_[i].usage.completion_tokens;
    if (i % static_cast<size_t>(request_.n) != 0) continue;
    total.prompt_tokens += choices_[i].usage.prompt_tokens;
    total.cached_tokens += choices_[i].usage.cached_tokens;
  }
  return total;
}

void Generation::finish_request() {
  int64_t longest = 0;
  for (const Choice& choice : choices_) longest = std::max(longest, choice.num_tokens);
  context_.metrics->longest_choice(longest);
  const UsageCounts usage = total_usage();
  if (publication_) {
    exchange_->on_unsent(
        [mailbox = mailbox_, publication = std::move(*publication_)] { mailbox->give_back(publication); });
    publication_.reset();
  }
  if (request_.stream) {
    std::string last;
    if (request_.include_usage) last = writer_.bare_chunk(usage, "");
    last += kSseDone;
    exchange_->write(last);
    exchange_->finish();
    end();
    return;
  }
  std::vector<ChoicePart> parts;
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    parts.push_back({static_cast<int64_t>(i), choice.whole_text, choice.whole_tokens, choice.finish, choice.stop_reason,
                     choice.prompt});
  }
  HttpResponse response;
  response.headers.emplace_back("X-Request-Id", request_id_);
  response.body = writer_.whole(parts, usage, kv_transfer_, choices_.front().prompt);
  exchange_->respond(std::move(response));
  end();
}

void Generation::fail(const Error& error) {
  if (ended_) return;
  log_debug("api", "request {} failed: {}", request_id_, error.message);
  error_ = error.message;
  cancel_choices("error");
  const int status = http_status(error);
  if (stream_open_) {
    exchange_->write(sse_event(error_body(error, status)) + std::string(kSseDone));
    exchange_->finish();
  } else {
    HttpResponse response = error_response(error);
    response.headers.emplace_back("X-Request-Id", request_id_);
    exchange_->respond(std::move(response));
  }
  end();
}

void Generation::leave() {
  if (ended_) return;
  log_debug("api", "the client of request {} left", request_id_);
  error_ = "cancelled";
  cancel_choices("abort");
  end();
}

void Generation::cancel_choices(std::string_view reason) {
  const int64_t now_us = context_.clock->now_us();
  for (Choice& choice : choices_) {
    if (choice.done || !choice.submitted) continue;
    choice.done = true;
    context_.worker->cancel(choice.id);
    context_.metrics->ended(reason, seconds_between(arrival_us_, now_us),
                            seconds_between(choice.first_token_us, choice.last_token_us), choice.usage.prompt_tokens,
                            choice.num_tokens);
  }
}

// Names are those of OpenTelemetry's conventions for generative AI and, where these have none, of vLLM's spans.
void Generation::describe(Span& span, int64_t now_us) const {
  span.name = "llm_request";
  span.is_server = true;
  span.start_us = wall_us(arrival_us_, now_us);
  span.end_us = wall_us(now_us, now_us);
  span.error = error_;
  int64_t first_token_us = 0;
  int64_t num_tokens = 0;
  for (const Choice& choice : choices_) {
    num_tokens += choice.num_tokens;
    if (choice.first_token_us != 0 && (first_token_us == 0 || choice.first_token_us < first_token_us)) {
      first_token_us = choice.first_token_us;
    }
  }
  span.attributes = {{"gen_ai.request.id", request_id_},
                     {"gen_ai.request.model", request_.model},
                     {"gen_ai.request.n", request_.n},
                     {"gen_ai.usage.prompt_tokens", total_usage().prompt_tokens},
                     {"gen_ai.usage.completion_tokens", num_tokens},
                     {"gen_ai.latency.e2e", seconds_between(arrival_us_, now_us)}};
  if (first_token_us != 0) {
    span.attributes.emplace_back("gen_ai.latency.time_to_first_token", seconds_between(arrival_us_, first_token_us));
  }
}

void Generation::end() {
  if (ended_) return;
  ended_ = true;
  if (publication_) mailbox_->give_back(*publication_);  // taken, but not answered
  const std::function<void(Generation&)> on_end = std::move(on_end_);
  if (on_end) on_end(*this);
}

}  // namespace tandem::api
