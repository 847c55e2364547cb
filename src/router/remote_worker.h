// One leg of a request over HTTP: a token request out, token events back. Knows the wire, not the other leg.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "src/api/http_client.h"
#include "src/base/result.h"
#include "src/engine/worker.h"
#include "src/router/two_legs.h"

namespace tandem::router {

struct LegRequest {
  const engine::TokenRequest& request;  // used during the call only
  std::string transfer;                 // kv_transfer_params as JSON text, "" for none
  std::string traceparent;              // "" for none
  int64_t remaining_ms = 0;             // until the request's deadline; > 0
  bool publishes = false;               // LegOrder::publishes
};

// After on_failed, or an event with `finish`, nothing follows.
struct DecodeHandlers {
  std::function<void(std::string transfer)> on_reserved;
  std::function<void(engine::TokenEvent&&)> on_event;
  std::function<void(LegFault fault)> on_failed;
};
struct PrefillHandlers {
  std::function<void(std::string transfer)> on_done;
  std::function<void(LegFault fault)> on_failed;
};

// One thread: that of the client's io_context. Handlers are called there, never before start_… returns.
class RemoteWorker {
 public:
  // `client` must outlive this. `api_key` may be empty.
  RemoteWorker(api::HttpClient& client, api::HttpUrl url, std::string api_key);

  api::CallId start_decode(const LegRequest& leg, DecodeHandlers handlers);
  api::CallId start_prefill(const LegRequest& leg, PrefillHandlers handlers);
  // Closes the leg's connection, which tells the worker; no handler follows.
  void cancel(api::CallId call) { client_.cancel(call); }
  // Tells the worker that nobody comes for what it has published (POST api::kReleasePath). `transfer` is the
  // kv_transfer_params object that it gave. Sent once; whatever comes of it, `on_done` is called.
  void release(const std::string& transfer, std::function<void()> on_done);

  const api::HttpUrl& url() const { return url_; }

 private:
  api::ClientRequest make_request(const LegRequest& leg, std::string body) const;
  api::HttpClient& client_;
  api::HttpUrl url_;
  std::string api_key_;
};

}  // namespace tandem::router
