// A small asynchronous HTTP/1.1 client for the router, the load generator, the chat program and tests: JSON requests,
// whole or streamed responses, cancellation, deadlines, and a keep-alive pool per host and port.
//
//   HttpClient client(io, {});
//   ClientRequest request = json_request("/v1/completions", body);
//   CallId call = client.start(url, std::move(request), {
//       .on_event = [](const SseEvent& event) { … },          // each server-sent event of a 2xx response
//       .on_done = [](Result<ClientResponse> response) { … }  // last, exactly once, unless cancelled
//   });
//   client.cancel(call);  // closes the connection: the server sees that its client has left
//   client.leave(call, within);  // the same, but an answer that was under way is still taken
//
// One thread: every member and every handler runs on the thread that runs `io`. Use asio::post to get there.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>

#include "src/api/http_types.h"
#include "src/api/sse.h"
#include "src/base/ids.h"
#include "src/base/result.h"

namespace boost::asio {
class io_context;
}

namespace tandem::api {

// Error::code of a call that never reached its server: no connection was made.
inline constexpr const char* kConnectFailed = "connect_failed";

using CallId = StrongId<struct CallIdTag, uint64_t>;

struct ClientRequest {
  std::string method = "GET";
  std::string target = "/";  // path and query; the URL's path is put before it
  HttpHeaders headers;       // besides Host, Content-Length and Connection, which are made here
  std::string body;
  std::chrono::milliseconds connect_timeout{5'000};
  // No byte received or sent for this long is an error. Covers the wait for the first byte too.
  std::chrono::milliseconds idle_timeout{120'000};
  std::chrono::milliseconds total_timeout{0};  // 0: none
};

// A POST with Content-Type: application/json.
ClientRequest json_request(std::string target, std::string body);

struct ClientResponse {
  int status = 0;
  HttpHeaders headers;
  std::string body;  // empty where on_body or on_event took it

  bool is_success() const { return status >= 200 && status < 300; }
};

// Unset members are skipped. on_body and on_event get the body of 2xx responses only; an error's body is always
// collected into ClientResponse, so that on_done can show it.
struct ClientHandlers {
  std::function<void(const ClientResponse& head)> on_head{};  // status and headers are there, the body is not
  std::function<void(std::string_view bytes)> on_body{};      // pieces as they arrive
  std::function<void(const SseEvent&)> on_event{};            // if the response is text/event-stream
  // A response with any status is a value; an error is: no connection or a broken one (kUnavailable), a time-out
  // (kDeadlineExceeded), a malformed or too large response (kDataLoss), a line break in a header (kInvalidArgument).
  std::function<void(Result<ClientResponse>)> on_done{};
};

struct HttpClientOptions {
  size_t max_idle_per_host = 256;  // connections kept for reuse
  std::chrono::milliseconds idle_keep{30'000};
  size_t max_body_bytes = 256UL << 20;  // of collected bodies
};

class HttpClient {
 public:
  HttpClient(boost::asio::io_context& io, HttpClientOptions options);
  ~HttpClient();  // cancels every call
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // No handler is called before this returns. A request on a kept connection that the server closed without reading it
  // is sent once more on a fresh connection.
  CallId start(const HttpUrl& url, ClientRequest request, ClientHandlers handlers);
  // No handler is called afterwards. Unknown or finished ids are ignored.
  void cancel(CallId id);
  // For a request whose answer must not be lost if server and client act at the same time: closes the sending side
  // only, so that the server sees that its client has left. What it had sent before goes to the handlers as ever, for
  // `within` at most, and on_done comes. A request that has not been sent as a whole is cancelled.
  void leave(CallId id, std::chrono::milliseconds within);
  size_t num_calls() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// One request on an event loop of its own, for programs that have nothing else to do meanwhile.
Result<ClientResponse> fetch(const HttpUrl& url, ClientRequest request);

}  // namespace tandem::api
