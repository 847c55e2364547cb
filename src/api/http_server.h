// HTTP/1.1 server for JSON requests and event streams: strict framing, limits on everything, back-pressure, and
// detection of clients that leave while their request runs.
//
// One thread: every member, handler and callback runs on the thread that runs `io`. A handler gets an HttpExchange,
// may keep it, and answers now or later, whole or as a stream. It must not block.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/api/api_error.h"
#include "src/api/http_types.h"
#include "src/base/result.h"

namespace boost::asio {
class io_context;
}

namespace tandem::api {

struct HttpRequest {
  std::string method;
  std::string path;       // without query, not percent-decoded
  std::string path_tail;  // what the "*" at the end of a route's path stands for
  HttpHeaders headers;
  std::string body;
};

// One request and its response. Dropping the last reference without an answer sends 500.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;
  virtual HttpRequest& request() = 0;

  // Exactly one of: respond(); or start_stream(), any number of write(), finish().
  virtual void respond(HttpResponse response) = 0;
  virtual void start_stream(HttpResponse head) = 0;  // the head's body is ignored
  // Takes `bytes` at once and never waits: a client that reads so slowly that more than
  // HttpServerOptions::max_buffered_bytes pile up is cut.
  virtual void write(std::string_view bytes) = 0;
  virtual void finish() = 0;

  // False once the client has left or was cut; everything above is then ignored.
  virtual bool is_open() const = 0;
  // Called at most once, if the exchange ends before the answer was complete. A client that closes only its sending
  // side counts as one that left.
  virtual void on_disconnect(std::function<void()> callback) = 0;
  // Called at most once, if the answer was complete and the client is gone before the kernel has taken all of it. Set
  // it before respond() or finish(). What the kernel has may still be lost; nobody here hears of that.
  virtual void on_unsent(std::function<void()> callback) = 0;
};

using HttpHandler = std::function<void(std::shared_ptr<HttpExchange>)>;

struct HttpRoute {
  std::string method;  // "GET" also answers HEAD
  std::string path;    // compared byte by byte; "/v1/models/*" takes anything after the last '/'
  bool needs_auth = true;
  HttpHandler handler;
};

// One answered (or cut: status 499) request, for metrics and logs.
struct HttpRecord {
  std::string_view route;   // HttpRoute::path, or "none"
  std::string_view method;  // "other" if it is not one of the usual ones
  int status = 0;
  double seconds = 0;  // from the complete head to the end of the answer
};

struct HttpServerOptions {
  size_t max_head_bytes = 16UL << 10;
  size_t max_headers = 100;
  size_t max_uri_bytes = 8UL << 10;
  size_t max_body_bytes = 32UL << 20;
  size_t max_total_body_bytes = 1UL << 30;               // of all requests at once; more is 503
  size_t max_connections = 8192;                         // more are answered with 503 and closed
  size_t max_pipelined_bytes = 64UL << 10;               // read ahead while a response runs; more ends keep-alive
  size_t max_buffered_bytes = 1UL << 20;                 // of an event stream, waiting for its client
  int send_buffer_bytes = 0;                             // SO_SNDBUF; 0: the kernel's choice
  std::chrono::milliseconds idle_timeout{75'000};        // between requests
  std::chrono::milliseconds head_timeout{10'000};        // from the first byte to the end of the head
  std::chrono::milliseconds body_stall_timeout{15'000};  // without a byte
  std::chrono::milliseconds body_timeout{120'000};       // for the whole body
  std::chrono::milliseconds write_timeout{30'000};       // for each 64 KiB of output
  // Says whether a request to a route with needs_auth may pass. Unset: all may.
  std::function<Status(const HttpRequest&)> authorize{};
  // Called for every request, but not after close().
  std::function<void(const HttpRecord&)> on_complete{};
};

class HttpServer {
 public:
  // Binds and listens; port 0 takes any free one. Nothing is accepted before start().
  static Result<std::unique_ptr<HttpServer>> listen(boost::asio::io_context& io, const std::string& host, uint16_t port,
                                                    HttpServerOptions options);
  // Takes connections from the same socket as `first`, on another io_context: each goes to one of the servers that wait.
  // Errors: the process has no descriptor left.
  static Result<std::unique_ptr<HttpServer>> share(boost::asio::io_context& io, const HttpServer& first,
                                                   HttpServerOptions options);
  ~HttpServer();  // as close()
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  uint16_t port() const;
  void add_route(HttpRoute route);
  const std::vector<HttpRoute>& routes() const;

  void start();
  // Stops accepting; running requests go on, new ones on open connections get 503. `on_idle` is called when the last
  // connection has ended.
  void drain(std::function<void()> on_idle);
  // Cuts every connection.
  void close();
  size_t num_connections() const;

  struct Impl;  // public for the connections in http_server.cc only

 private:
  explicit HttpServer(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::api
