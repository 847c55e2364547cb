#include "src/api/frontend.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <charconv>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "src/api/api_keys.h"
#include "src/api/generation.h"
#include "src/api/request_fields.h"
#include "src/api/request_metrics.h"
#include "src/api/text_thread.h"
#include "src/api/tokenize.h"
#include "src/base/log.h"

namespace tandem::api {

namespace asio = boost::asio;

namespace {

// The worker ends requests at their deadline; if it does not, because it hangs, the front end does so this much later.
constexpr int64_t kDeadlineGraceUs = 1'000'000;
constexpr std::chrono::milliseconds kDeadlineCheck{250};
constexpr size_t kMaxRequestIdBytes = 128;

// Headers by which other systems steer requests inside a cluster. Where they cannot be obeyed they are refused: to
// ignore them would answer another request than the one meant.
constexpr const char* kPrefillerHeader = "x-prefiller-host-port";
constexpr const char* kRankHeader = "x-data-parallel-rank";

// Who serves now. Shared with text jobs and running requests.
struct Serving {
  ServedText text;
  engine::Worker* worker;
  RequestMetrics metrics;
};

// The span of a request, and the client's that it belongs to.
struct RequestTrace {
  TraceContext span;
  TraceContext parent;
};

// A text on its way through a text thread. `stop` ends it within milliseconds; `why` says so to its client. All but
// `stop` belongs to the I/O thread.
struct TextJob {
  std::atomic<bool> stop = false;
  std::optional<Error> why;
  int64_t deadline_us = std::numeric_limits<int64_t>::max();

  void end(const Error& reason) {
    if (!why) why = reason;
    stop = true;
  }
};

struct Prepared {
  OpenAiRequest request;
  std::vector<engine::TokenRequest> choices;
};

Result<std::string> read_request_id(const HttpRequest& request) {
  const std::string* given = find_header(request.headers, "x-request-id");
  if (given == nullptr) return random_hex(16);
  const bool is_visible = std::all_of(given->begin(), given->end(), [](char c) { return c > ' ' && c < 0x7f; });
  if (given->empty() || given->size() > kMaxRequestIdBytes || !is_visible) {
    return field_error("X-Request-Id", "invalid_value",
                       fmt::format("X-Request-Id must have 1 … {} visible ASCII characters", kMaxRequestIdBytes));
  }
  return *given;
}

// What a router says is left of its own deadline; it can only shorten ours.
Result<int64_t> read_timeout_us(const HttpRequest& request, int64_t longest_us) {
  const std::string* given = find_header(request.headers, "x-request-timeout-ms");
  if (given == nullptr) return longest_us;
  int64_t milliseconds = 0;
  const char* const end = given->data() + given->size();
  const auto [rest, ec] = std::from_chars(given->data(), end, milliseconds);
  if (ec != std::errc() || rest != end || milliseconds < 1) {
    return field_error("X-Request-Timeout-Ms", "invalid_value",
                       "X-Request-Timeout-Ms must be a positive number of milliseconds");
  }
  return milliseconds < longest_us / 1000 ? milliseconds * 1000 : longest_us;
}

// A header that steers a request; null if it is not there. Two would leave the choice to whoever reads them first.
Result<const std::string*> read_steering(const HttpRequest& request, const char* name) {
  const auto is_it = [name](const auto& header) { return equal_ignoring_case(header.first, name); };
  const int64_t count = std::count_if(request.headers.begin(), request.headers.end(), is_it);
  if (count <= 1) return find_header(request.headers, name);
  return field_error(name, "invalid_value", fmt::format("the header {} is given {} times; give it once", name, count));
}

// The prefill worker that the client names, "" if it leaves the choice to this server.
Result<std::string> read_prefiller(const HttpRequest& request, const FrontendOptions& options) {
  TANDEM_ASSIGN(const std::string* const given, read_steering(request, kPrefillerHeader));
  if (given == nullptr) return std::string();
  if (!options.check_prefiller) {
    return field_error(kPrefillerHeader, "unsupported_parameter",
                       fmt::format("the header {} is for routers with prefill workers", kPrefillerHeader));
  }
  if (Status allowed = options.check_prefiller(*given); !allowed.ok()) {
    Error error = allowed.error();
    error.param = kPrefillerHeader;
    return error;
  }
  return *given;
}

// The rank that the request is for; -1: any.
Result<int32_t> read_pinned_rank(const HttpRequest& request, const FrontendOptions& options) {
  TANDEM_ASSIGN(const std::string* const text, read_steering(request, kRankHeader));
  if (text == nullptr) return -1;
  if (options.num_ranks == 0) {
    return field_error(kRankHeader, "unsupported_parameter", "the header x-data-parallel-rank is for servers with ranks");
  }
  int32_t rank = -1;
  const std::from_chars_result parsed = std::from_chars(text->data(), text->data() + text->size(), rank);
  const bool is_number = parsed.ec == std::errc() && parsed.ptr == text->data() + text->size();
  if (is_number && rank >= options.first_rank && rank < options.first_rank + options.num_ranks) return rank;
  return field_error(kRankHeader, "invalid_value",
                     fmt::format("x-data-parallel-rank is '{}'; this server has ranks {} … {}", text->substr(0, 32),
                                 options.first_rank, options.first_rank + options.num_ranks - 1));
}

// The ids of a text, or the error that says how far it is over the context.
Result<std::vector<TokenId>> check_context(const ServedText& served, Result<std::vector<TokenId>> ids) {
  if (ids.ok() || ids.error().code != "context_length_exceeded") return ids;
  return context_error(served.model, ids.error().param,
                       fmt::format("the prompt has {}; shorten it", ids.error().message));
}

Result<std::vector<std::vector<TokenId>>> encode_prompts(const ServedText& served, const OpenAiRequest& request,
                                                         const std::atomic<bool>* stop) {
  const text::EncodeLimits limits = {.max_tokens = served.model.max_model_len - 1, .stop = stop};
  std::vector<std::vector<TokenId>> prompts;
  if (request.kv_transfer && request.kv_transfer->do_remote_prefill && !request.kv_transfer->prompt_token_ids.empty()) {
    // The prefill side has tokenized it; its tokens are what the KV belongs to.
    const std::vector<TokenId>& ids = request.kv_transfer->prompt_token_ids;
    for (const TokenId id : ids) {
      if (id >= 0 && id < served.model.vocab_size) continue;
      return field_error(
          "kv_transfer_params.prompt_token_ids", "invalid_value",
          fmt::format("the token id {} is out of vocabulary; ids are 0 … {}", id, served.model.vocab_size - 1));
    }
    prompts.push_back(ids);
    return prompts;
  }
  if (request.endpoint == Endpoint::kChat) {
    TANDEM_ASSIGN(std::vector<TokenId> ids, check_context(served, encode_chat(served, request.chat, limits)));
    prompts.push_back(std::move(ids));
    return prompts;
  }
  for (const Prompt& prompt : request.prompts) {
    if (const auto* ids = std::get_if<std::vector<TokenId>>(&prompt)) {
      prompts.push_back(*ids);
      continue;
    }
    TANDEM_ASSIGN(std::vector<TokenId> ids,
                  check_context(served, served.tokenizer->encode(std::get<std::string>(prompt),
                                                                 request.add_special_tokens, limits)));
    prompts.push_back(std::move(ids));
  }
  return prompts;
}

// From the body's bytes to token requests; pure, so it may run on a text thread.
Result<Prepared> prepare(const ServedText& served, const RequestPolicy& policy, Endpoint endpoint,
                         const std::string& body, const std::string& request_id, const std::string& session,
                         const std::string& prefiller, int32_t pinned_rank, int64_t deadline_us,
                         const std::atomic<bool>* stop) {
  TANDEM_ASSIGN(const Json json, parse_strict_json(body, "the request body"));
  Prepared out;
  TANDEM_ASSIGN(out.request, endpoint == Endpoint::kChat ? parse_chat_request(json, served.model, policy)
                                                         : parse_completion_request(json, served.model, policy));
  TANDEM_ASSIGN(std::vector<std::vector<TokenId>> prompts, encode_prompts(served, out.request, stop));
  TANDEM_ASSIGN(out.choices,
                make_token_requests(out.request, std::move(prompts), served.model, request_id, deadline_us));
  for (engine::TokenRequest& choice : out.choices) {
    choice.session = session;
    choice.prefiller = prefiller;
    choice.pinned_rank = pinned_rank;
  }
  return out;
}

HttpResponse json_response(const Json& json) {
  HttpResponse response;
  response.body = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  return response;
}

class Mailbox final : public EventMailbox, public std::enable_shared_from_this<Mailbox> {
 public:
  using GiveBack = std::function<void(const transfer::KvTransferParams&)>;

  Mailbox(asio::io_context& io, GiveBack give_back) : io_(&io), give_back_(std::move(give_back)) {}

  void give_back(const transfer::KvTransferParams& publication) override {
    if (give_back_) give_back_(publication);
  }

  void push(std::weak_ptr<Generation> target, size_t choice, engine::TokenEvent event) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (io_ == nullptr) return;
    letters_.push_back({std::move(target), choice, std::move(event)});
    // One wake-up for all events of a step of the engine.
    if (letters_.size() == 1) asio::post(*io_, [self = shared_from_this()] { self->deliver(); });
  }

  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    io_ = nullptr;
    give_back_ = nullptr;
    letters_.clear();
  }

 private:
  struct Letter {
    std::weak_ptr<Generation> target;
    size_t choice;
    engine::TokenEvent event;
  };

  void deliver() {
    std::vector<Letter> letters;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      letters.swap(letters_);
    }
    for (Letter& letter : letters) {
      const std::shared_ptr<Generation> target = letter.target.lock();
      if (target && target->take(letter.choice, std::move(letter.event))) continue;
      if (letter.event.finish && letter.event.kv_transfer) give_back(*letter.event.kv_transfer);
    }
  }

  std::mutex mutex_;
  asio::io_context* io_;
  GiveBack give_back_;  // on the I/O thread
  std::vector<Letter> letters_;
};

}  // namespace

struct Frontend::Impl : std::enable_shared_from_this<Frontend::Impl> {
  Impl(asio::io_context& context, FrontendOptions frontend_options, const Clock& frontend_clock, Registry& metrics)
      : io(context),
        options(std::move(frontend_options)),
        clock(frontend_clock),
        registry(metrics),
        keys(options.api_keys),
        mailbox(std::make_shared<Mailbox>(context,
                                          [this](const transfer::KvTransferParams& publication) {
                                            if (serving) serving->worker->release(publication);
                                          })),
        deadline_timer(context) {}

  // ---- Serving ----

  // Runs `work` in line or, if `bytes` are many, on a text thread; then `then` with its result, here. The work ends
  // early when its client leaves, at `deadline_us`, and when nothing is served any more.
  template <typename T>
  void run_text(HttpExchange& exchange, size_t bytes, int64_t deadline_us,
                std::function<Result<T>(const std::atomic<bool>* stop)> work, std::function<void(Result<T>)> then) {
    if (bytes <= kInlineBodyBytes) return then(work(nullptr));
    auto text = std::make_shared<TextJob>();
    text->deadline_us = deadline_us;
    exchange.on_disconnect(
        [text] { text->end(make_error(ErrorKind::kAborted, "the client left before its text was tokenized")); });
    // What `then` holds must be released on the I/O thread: it is moved along, not copied.
    auto job = [this, weak = weak_from_this(), text, work = std::move(work), then]() mutable {
      auto result = std::make_shared<Result<T>>(make_error(ErrorKind::kAborted, "the request was cancelled"));
      if (!text->stop) *result = work(&text->stop);
      asio::post(io, [weak, text, result, then = std::move(then)] {
        const std::shared_ptr<Impl> self = weak.lock();
        if (!self) return;
        self->texts.erase(text);
        then(text->why ? Result<T>(*text->why) : std::move(*result));
      });
    };
    texts.insert(text);
    watch_deadlines();
    TextThread& thread = bytes <= kLargeBodyBytes ? *text_thread : *large_text_thread;
    if (thread.post(std::move(job))) return;
    texts.erase(text);
    then(make_error(ErrorKind::kResourceExhausted, "{} large requests are waiting already; retry later",
                    TextThread::kMaxJobs));
  }

  // The present serving, or the error that says why there is none.
  Result<std::shared_ptr<Serving>> find_serving() const {
    if (draining_because) return *draining_because;
    if (serving) return serving;
    return closed_because;
  }

  void generate(Endpoint endpoint, std::shared_ptr<HttpExchange> exchange) {
    const int64_t arrival_us = clock.now_us();
    HttpRequest& request = exchange->request();
    const Result<std::string> request_id = read_request_id(request);
    if (!request_id.ok()) return exchange->respond(error_response(request_id.error()));
    const Result<std::string> prefiller = read_prefiller(request, options);
    if (!prefiller.ok()) return refuse(*exchange, *request_id, prefiller.error());
    const Result<int32_t> pinned_rank = read_pinned_rank(request, options);
    if (!pinned_rank.ok()) return refuse(*exchange, *request_id, pinned_rank.error());
    const Result<std::shared_ptr<Serving>> now_serving = find_serving();
    if (!now_serving.ok()) return refuse(*exchange, *request_id, now_serving.error());
    if (num_requests >= options.max_concurrent_requests) {
      return refuse(*exchange, *request_id,
                    make_error(ErrorKind::kResourceExhausted, "{} requests are running, the limit is {}; retry later",
                               num_requests.load(), options.max_concurrent_requests));
    }
    const Result<int64_t> timeout_us = read_timeout_us(request, static_cast<int64_t>(options.request_timeout_s * 1e6));
    if (!timeout_us.ok()) return refuse(*exchange, *request_id, timeout_us.error());
    const int64_t deadline_us = arrival_us + *timeout_us;
    const std::string* session = find_header(request.headers, "x-session-id");
    const RequestTrace trace = begin_trace(request);
    auto body = std::make_shared<std::string>(std::move(request.body));
    ++num_requests;
    run_text<Prepared>(
        *exchange, body->size(), deadline_us,
        [used = *now_serving, policy = options.policy, endpoint, body, id = *request_id,
         session = session == nullptr ? std::string() : *session, named = *prefiller, rank = *pinned_rank,
         deadline_us](const std::atomic<bool>* stop) {
          return prepare(used->text, policy, endpoint, *body, id, session, named, rank, deadline_us, stop);
        },
        [this, used = *now_serving, exchange, id = *request_id, arrival_us, trace](Result<Prepared> prepared) {
          begin(used, exchange, id, arrival_us, trace, std::move(prepared));
        });
  }

  void begin(const std::shared_ptr<Serving>& used, const std::shared_ptr<HttpExchange>& exchange,
             const std::string& request_id, int64_t arrival_us, const RequestTrace& trace, Result<Prepared> prepared) {
    if (prepared.ok() && used != serving) prepared = closed_because;  // the worker went away meanwhile
    if (!prepared.ok() || !exchange->is_open()) {
      --num_requests;
      if (!prepared.ok()) refuse(*exchange, request_id, prepared.error());
      return;
    }
    const GenerationContext context{used->worker, std::shared_ptr<const ServedText>(used, &used->text), &used->metrics,
                                    &clock};
    for (engine::TokenRequest& choice : prepared->choices) choice.trace = trace.span;
    auto generation =
        std::make_shared<Generation>(context, exchange, std::move(prepared->request), std::move(prepared->choices),
                                     request_id, arrival_us, [this, trace](Generation& ended) {
                                       end_trace(trace, ended);
                                       --num_requests;
                                       generations.erase(ended.shared_from_this());
                                     });
    generations.insert(generation);
    watch_deadlines();
    generation->start(mailbox);
  }

  // A malformed traceparent counts as none, as the standard has it.
  RequestTrace begin_trace(const HttpRequest& request) const {
    const std::string* given = find_header(request.headers, "traceparent");
    const TraceContext parent = given == nullptr ? TraceContext() : parse_traceparent(*given).value_or(TraceContext());
    if (options.spans == nullptr) return {parent, parent};
    return {child_of(parent), parent};
  }

  void end_trace(const RequestTrace& trace, const Generation& ended) const {
    if (options.spans == nullptr || !trace.span.sampled) return;
    Span span;
    ended.describe(span, clock.now_us());
    span.context = trace.span;
    span.parent = trace.parent.span_id;
    options.spans->add(std::move(span));
  }

  void refuse(HttpExchange& exchange, const std::string& request_id, const Error& error) {
    log_debug("api", "request {} refused: {}", request_id, error.message);
    HttpResponse response = error_response(error);
    response.headers.emplace_back("X-Request-Id", request_id);
    exchange.respond(std::move(response));
  }

  // Looks at the deadlines of all that runs, as long as something does.
  void watch_deadlines() {
    if (!std::exchange(is_watching_deadlines, true)) look_at_deadlines_later();
  }

  void look_at_deadlines_later() {
    deadline_timer.expires_after(kDeadlineCheck);
    deadline_timer.async_wait([weak = weak_from_this()](boost::system::error_code ec) {
      const std::shared_ptr<Impl> self = weak.lock();
      if (ec || !self) return;
      const int64_t late_us = self->clock.now_us() - kDeadlineGraceUs;
      std::vector<std::shared_ptr<Generation>> late;
      for (const auto& generation : self->generations) {
        if (generation->deadline_us() < late_us) late.push_back(generation);
      }
      const Error error = make_error(ErrorKind::kDeadlineExceeded, "the request was not finished by its deadline");
      for (const auto& generation : late) generation->fail(error);
      for (const std::shared_ptr<TextJob>& text : self->texts) {
        if (text->deadline_us < self->clock.now_us()) text->end(error);
      }
      self->is_watching_deadlines = !self->generations.empty() || !self->texts.empty();
      if (self->is_watching_deadlines) self->look_at_deadlines_later();
    });
  }

  void close_serving(Error why) {
    serving.reset();
    closed_because = std::move(why);
    const std::vector<std::shared_ptr<Generation>> running(generations.begin(), generations.end());
    for (const auto& generation : running) generation->fail(closed_because);
    for (const std::shared_ptr<TextJob>& text : texts) text->end(closed_because);
  }

  // ---- The small routes ----

  // A request that is answered at once, in the number of those that a shutdown waits for.
  void count_until_sent(HttpExchange& exchange) {
    ++num_requests;
    // Let go of when the kernel has all of the answer, or the client is gone.
    const std::shared_ptr<void> counted(nullptr, [weak = weak_from_this()](void*) {
      if (const std::shared_ptr<Impl> self = weak.lock()) --self->num_requests;
    });
    exchange.on_unsent([counted] {});
  }

  using TextAnswer = Result<Json>(const Json& body, const ServedText&, const std::atomic<bool>* stop);

  // Answers with what `work` makes of the parsed body and of what is served.
  void answer_json(std::shared_ptr<HttpExchange> exchange, TextAnswer* work) {
    const Result<std::shared_ptr<Serving>> now_serving = find_serving();
    if (!now_serving.ok()) return exchange->respond(error_response(now_serving.error()));
    auto body = std::make_shared<std::string>(std::move(exchange->request().body));
    const int64_t deadline_us = clock.now_us() + static_cast<int64_t>(options.request_timeout_s * 1e6);
    count_until_sent(*exchange);
    run_text<HttpResponse>(
        *exchange, body->size(), deadline_us,
        [used = *now_serving, body, work](const std::atomic<bool>* stop) -> Result<HttpResponse> {
          TANDEM_ASSIGN(const Json json, parse_strict_json(*body, "the request body"));
          TANDEM_ASSIGN(const Json out, work(json, used->text, stop));
          return json_response(out);
        },
        [exchange](Result<HttpResponse> response) {
          exchange->respond(response.ok() ? std::move(*response) : error_response(response.error()));
        });
  }

  static Json model_card(const ServedModel& model, const std::string& name) {
    return {{"id", name},
            {"object", "model"},
            {"created", model.created},
            {"owned_by", "tandem"},
            {"root", model.root},
            {"parent", nullptr},
            {"max_model_len", model.max_model_len},
            {"permission", Json::array()}};
  }

  // Also while requests are refused, since it ends waiting.
  void release(std::shared_ptr<HttpExchange> exchange) {
    if (!options.policy.accepts_kv_transfer) {
      return exchange->respond(error_response(
          field_error("kv_transfer_params", "unsupported_parameter",
                      "this server publishes no KV; ask a worker that was started with --kv-transfer-config")));
    }
    auto body = std::make_shared<std::string>(std::move(exchange->request().body));
    const int64_t deadline_us = clock.now_us() + static_cast<int64_t>(options.request_timeout_s * 1e6);
    run_text<transfer::KvTransferParams>(
        *exchange, body->size(), deadline_us, [body](const std::atomic<bool>* /*stop*/) { return read_release(*body); },
        [this, exchange](Result<transfer::KvTransferParams> named) {
          if (!named.ok()) return exchange->respond(error_response(named.error()));
          if (!serving) return exchange->respond(error_response(closed_because));
          serving->worker->release(*named);
          HttpResponse response = json_response(Json::object());
          response.status = 202;
          exchange->respond(std::move(response));
        });
  }

  static Result<transfer::KvTransferParams> read_release(const std::string& body) {
    TANDEM_ASSIGN(const Json json, parse_strict_json(body, "the request body"));
    if (!json.is_object() || !json.contains("kv_transfer_params")) {
      return field_error("kv_transfer_params", "missing_required_parameter",
                         "'kv_transfer_params' is missing: the object that the prefill leg's answer carried");
    }
    TANDEM_ASSIGN(transfer::KvTransferParams named,
                  transfer::parse_kv_transfer_params(nlohmann::json(json["kv_transfer_params"])));
    if (named.remote_engine_id.empty() || named.remote_request_id.empty()) {
      return field_error("kv_transfer_params", "invalid_value",
                         "kv_transfer_params of a publication need remote_engine_id and remote_request_id");
    }
    return named;
  }

  void list_models(HttpExchange& exchange) {
    const Result<std::shared_ptr<Serving>> now_serving = find_serving();
    if (!now_serving.ok()) return exchange.respond(error_response(now_serving.error()));
    Json list = {{"object", "list"}, {"data", Json::array()}};
    for (const std::string& name : (*now_serving)->text.model.names) {
      list["data"].push_back(model_card((*now_serving)->text.model, name));
    }
    exchange.respond(json_response(list));
  }

  void show_model(HttpExchange& exchange) {
    const Result<std::shared_ptr<Serving>> now_serving = find_serving();
    if (!now_serving.ok()) return exchange.respond(error_response(now_serving.error()));
    std::string name;
    const ServedModel& model = (*now_serving)->text.model;
    const bool decoded = decode_percent(exchange.request().path_tail, name);
    if (!decoded || std::find(model.names.begin(), model.names.end(), name) == model.names.end()) {
      return exchange.respond(error_response({ErrorKind::kNotFound,
                                              fmt::format("the model {} does not exist; this server has {}",
                                                          quote_for_message(name), fmt::join(model.names, ", ")),
                                              "model", "model_not_found"}));
    }
    exchange.respond(json_response(model_card(model, name)));
  }

  void show_health(HttpExchange& exchange) {
    Health health;
    if (draining_because) {
      health = {false, "draining", std::nullopt};
    } else if (options.health) {
      health = options.health();
    } else if (serving) {
      health = {true, "ok", std::nullopt};
    } else {
      health = {false, closed_because.code.empty() ? "unavailable" : closed_because.code, std::nullopt};
    }
    Json body = {{"status", health.status}};
    if (health.progress) body["progress"] = *health.progress;
    HttpResponse response = json_response(body);
    response.status = health.ready ? 200 : 503;
    exchange.respond(std::move(response));
  }

  asio::io_context& io;
  const FrontendOptions options;
  const Clock& clock;
  Registry& registry;
  HttpMetrics http_metrics{registry};
  const ApiKeys keys;
  const std::shared_ptr<Mailbox> mailbox;
  asio::steady_timer deadline_timer;
  std::shared_ptr<Serving> serving;  // null: `closed_because` says why
  Error closed_because = Error{ErrorKind::kUnavailable, "the model is still loading", "", "loading"};
  std::optional<Error> draining_because;
  std::unordered_set<std::shared_ptr<Generation>> generations;
  std::atomic<int64_t> num_requests = 0;  // with those whose text is still worked on
  std::unordered_set<std::shared_ptr<TextJob>> texts;
  bool is_watching_deadlines = false;
  std::unique_ptr<TextThread> text_thread = std::make_unique<TextThread>();
  std::unique_ptr<TextThread> large_text_thread = std::make_unique<TextThread>();
};

Frontend::Frontend(asio::io_context& io, FrontendOptions options, const Clock& clock, Registry& registry)
    : impl_(std::make_shared<Impl>(io, std::move(options), clock, registry)) {}

Frontend::~Frontend() {
  close(make_error(ErrorKind::kUnavailable, "the server is shutting down"));
  impl_->mailbox->close();
  impl_->deadline_timer.cancel();
  impl_->text_thread.reset();
  impl_->large_text_thread.reset();
}

HttpServerOptions Frontend::http_options() const {
  HttpServerOptions http;
  http.authorize = [impl = impl_](const HttpRequest& request) { return impl->keys.check(request); };
  http.on_complete = [impl = impl_](const HttpRecord& record) { impl->http_metrics.count(record); };
  return http;
}

void Frontend::add_routes(HttpServer& server) {
  const auto add = [&server](const char* method, const char* path, bool needs_auth, auto handler) {
    server.add_route({method, path, needs_auth,
                      [handler](std::shared_ptr<HttpExchange> exchange) { handler(std::move(exchange)); }});
  };
  using ExchangePtr = std::shared_ptr<HttpExchange>;
  const std::shared_ptr<Impl> impl = impl_;
  add("POST", "/v1/completions", true, [impl](ExchangePtr e) { impl->generate(Endpoint::kCompletions, e); });
  add("POST", "/v1/chat/completions", true, [impl](ExchangePtr e) { impl->generate(Endpoint::kChat, e); });
  add("GET", "/v1/models", true, [impl](ExchangePtr e) { impl->list_models(*e); });
  add("GET", "/v1/models/*", true, [impl](ExchangePtr e) { impl->show_model(*e); });
  add("POST", "/tokenize", true, [impl](ExchangePtr e) { impl->answer_json(e, tokenize); });
  add("POST", "/detokenize", true, [impl](ExchangePtr e) { impl->answer_json(e, detokenize); });
  add("POST", kReleasePath, true, [impl](ExchangePtr e) { impl->release(std::move(e)); });
  add("GET", "/tandem/v1/text_bundle", true, [impl](ExchangePtr e) {
    const auto serving = impl->find_serving();
    if (!serving.ok()) return e->respond(error_response(serving.error()));
    HttpResponse response;
    response.body = served_text_to_json((*serving)->text);
    e->respond(std::move(response));
  });
  add("GET", "/load", true, [impl](ExchangePtr e) {
    const int64_t load = impl->options.server_load ? impl->options.server_load() : impl->num_requests.load();
    e->respond(json_response({{"server_load", load}}));
  });
  add("GET", "/health", false, [impl](ExchangePtr e) { impl->show_health(*e); });
  add("GET", "/ping", false, [impl](ExchangePtr e) { impl->show_health(*e); });
  add("GET", "/version", false, [impl](ExchangePtr e) {
    e->respond(json_response({{"version", impl->options.version}}));
  });
  add("GET", "/metrics", false, [impl](ExchangePtr e) {
    HttpResponse response;
    response.content_type = kMetricsContentType;
    response.body = impl->registry.expose();
    e->respond(std::move(response));
  });
}

void Frontend::open(ServedText served, engine::Worker& worker) {
  CHECK_GT(served.model.max_model_len, 1);
  CHECK_GT(served.model.vocab_size, 0);
  const std::string& label = impl_->options.model_name.empty() ? served.model.names.front() : impl_->options.model_name;
  RequestMetrics metrics(impl_->registry, label, served.model.max_model_len);
  impl_->serving = std::make_shared<Serving>(Serving{std::move(served), &worker, metrics});
}

void Frontend::close(Error why) { impl_->close_serving(std::move(why)); }

void Frontend::drain(Error why) { impl_->draining_because = std::move(why); }

int64_t Frontend::num_requests() const { return impl_->num_requests; }

}  // namespace tandem::api
