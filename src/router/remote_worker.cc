#include "src/router/remote_worker.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "src/api/frontend.h"
#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/router/completion_wire.h"

namespace tandem::router {
namespace {

// A worker on this host or in this rack accepts in microseconds; two seconds tell one that is gone from one that is
// slow.
constexpr std::chrono::milliseconds kConnectTimeout{2'000};
constexpr size_t kMaxRequestIdBytes = 128;
constexpr int64_t kDeadlineSlackUs = 20'000;  // timers fire a little early or late
constexpr int64_t kPublishingSlackMs = 500;
constexpr std::chrono::milliseconds kReleaseTimeout{5'000};

// What the client may know of a transport fault; addresses go to the log only.
LegFault transport_fault(const Error& error, const char* role, int64_t deadline_us) {
  log_warning("router", "{} worker {}", role, error.message);  // begins with the address
  LegFault fault{.error = worker_unavailable(fmt::format("the {} worker went away; try again", role)),
                 .reached = false};
  if (error.kind == ErrorKind::kDeadlineExceeded && SteadyClock().now_us() + kDeadlineSlackUs >= deadline_us) {
    fault.error = make_error(ErrorKind::kDeadlineExceeded, "the request's deadline passed");
  } else if (error.kind == ErrorKind::kDataLoss) {
    fault.error = make_error(ErrorKind::kDataLoss, "the {} worker's answer cannot be read", role);
  } else if (error.code == api::kConnectFailed) {
    fault.error = worker_unavailable(fmt::format("the {} worker cannot be reached; try again", role));
  } else {
    fault.died = error.kind == ErrorKind::kUnavailable;
  }
  return fault;
}

// The state of one decode stream, shared by the handlers of its call.
struct DecodeStream {
  CompletionReader reader;
  DecodeHandlers handlers;
  bool ended = false;

  void fail(LegFault fault) {
    if (std::exchange(ended, true)) return;
    handlers.on_failed(std::move(fault));
  }

  void take(const api::SseEvent& event) {
    if (ended) return;
    CompletionReader::Update update = reader.read(event.data);
    if (update.error) return fail({std::move(*update.error)});
    if (!update.transfer.empty() && !update.event) handlers.on_reserved(std::move(update.transfer));
    if (ended || !update.event) return;
    if (!update.transfer.empty()) {  // a publication, with the last token
      Result<transfer::KvTransferParams> params =
          transfer::parse_kv_transfer_params(nlohmann::json::parse(update.transfer, nullptr, false));
      if (!params.ok()) return fail({make_error(ErrorKind::kDataLoss, "the worker's kv_transfer_params cannot be read")});
      update.event->kv_transfer = std::move(params).value();
    }
    ended = update.event->finish.has_value();
    handlers.on_event(std::move(*update.event));
  }

  void finish(Result<api::ClientResponse> response, const api::HttpUrl& url, int64_t deadline_us) {
    if (ended) return;
    if (!response.ok()) return fail(transport_fault(response.error(), "decode", deadline_us));
    if (!response->is_success()) return fail({error_of_response(response->status, response->body)});
    log_warning("router", "worker {}: its stream ended without a finish reason", url.origin());
    fail({worker_unavailable("the decode worker ended its stream early; try again")});
  }
};

}  // namespace

RemoteWorker::RemoteWorker(api::HttpClient& client, api::HttpUrl url, std::string api_key)
    : client_(client), url_(std::move(url)), api_key_(std::move(api_key)) {}

api::ClientRequest RemoteWorker::make_request(const LegRequest& leg, std::string body) const {
  api::ClientRequest request = api::json_request("/v1/completions", std::move(body));
  // One choice of several has a suffix; workers take no longer ids than the front end does.
  request.headers.emplace_back("X-Request-Id", leg.request.external_id.substr(0, kMaxRequestIdBytes));
  request.headers.emplace_back("X-Request-Timeout-Ms", std::to_string(leg.remaining_ms));
  if (!leg.traceparent.empty()) request.headers.emplace_back("traceparent", leg.traceparent);
  if (!api_key_.empty()) request.headers.emplace_back("Authorization", "Bearer " + api_key_);
  // The core ends legs at their deadline. One that publishes is left to it, since it also takes what crosses that.
  const std::chrono::milliseconds remaining(leg.remaining_ms + (leg.publishes ? kPublishingSlackMs : 0));
  request.connect_timeout = std::min(kConnectTimeout, remaining);
  request.idle_timeout = remaining;  // a long queue is silent; a frozen worker is found by its probes
  request.total_timeout = remaining;
  return request;
}

api::CallId RemoteWorker::start_decode(const LegRequest& leg, DecodeHandlers handlers) {
  const int64_t deadline_us = SteadyClock().now_us() + leg.remaining_ms * 1000;
  const auto stream = std::make_shared<DecodeStream>(
      DecodeStream{CompletionReader(static_cast<int64_t>(leg.request.prompt.size()), leg.request.sampling.num_logprobs),
                   std::move(handlers)});
  api::ClientHandlers on_wire;
  on_wire.on_event = [stream](const api::SseEvent& event) { stream->take(event); };
  on_wire.on_done = [stream, url = url_, deadline_us](Result<api::ClientResponse> response) {
    stream->finish(std::move(response), url, deadline_us);
  };
  return client_.start(url_, make_request(leg, decode_body(leg.request, leg.transfer)), std::move(on_wire));
}

api::CallId RemoteWorker::start_prefill(const LegRequest& leg, PrefillHandlers handlers) {
  const int64_t deadline_us = SteadyClock().now_us() + leg.remaining_ms * 1000;
  api::ClientHandlers on_wire;
  on_wire.on_done = [handlers = std::move(handlers), deadline_us](Result<api::ClientResponse> response) {
    if (!response.ok()) return handlers.on_failed(transport_fault(response.error(), "prefill", deadline_us));
    if (!response->is_success()) return handlers.on_failed({error_of_response(response->status, response->body)});
    Result<std::string> transfer = read_prefill_response(response->body);
    if (!transfer.ok()) return handlers.on_failed({transfer.error()});
    handlers.on_done(std::move(transfer).value());
  };
  return client_.start(url_, make_request(leg, prefill_body(leg.request, leg.transfer)), std::move(on_wire));
}

void RemoteWorker::release(const std::string& transfer, std::function<void()> on_done) {
  api::ClientRequest request = api::json_request(api::kReleasePath, release_body(transfer));
  if (!api_key_.empty()) request.headers.emplace_back("Authorization", "Bearer " + api_key_);
  request.connect_timeout = kConnectTimeout;
  request.total_timeout = kReleaseTimeout;
  api::ClientHandlers on_wire;
  on_wire.on_done = [url = url_, on_done = std::move(on_done)](const Result<api::ClientResponse>& response) {
    // A worker that is gone has no publication any more, and one of another make does not know the path.
    if (!response.ok()) {
      log_debug("router", "a publication was not released: {}", response.error().message);
    } else if (!response->is_success()) {
      log_debug("router", "worker {} does not release a publication: status {}", url.origin(), response->status);
    }
    on_done();
  };
  client_.start(url_, std::move(request), std::move(on_wire));
}

}  // namespace tandem::router
