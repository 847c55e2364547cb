#include "src/api/http_client.h"

#include <algorithm>
#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>

#include "src/api/http_parser.h"
#include "src/api/socket_options.h"

namespace tandem::api {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using SteadyTime = std::chrono::steady_clock::time_point;

namespace {

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);
constexpr uint32_t kMaxHeadBytes = 64 * 1024;
constexpr size_t kReadBytes = 16 * 1024;
// Input that the parser cannot use yet: a head, or a chunk's size line.
constexpr size_t kMaxUnparsedBytes = kMaxHeadBytes + kReadBytes;

std::string make_head(const HttpUrl& url, const ClientRequest& request) {
  std::string head =
      fmt::format("{} {}{} HTTP/1.1\r\nHost: {}\r\n", request.method, url.path, request.target, url.origin());
  for (const auto& [name, value] : request.headers) head += fmt::format("{}: {}\r\n", name, value);
  if (!request.body.empty() || request.method == "POST") {
    head += fmt::format("Content-Length: {}\r\n", request.body.size());
  }
  return head + "\r\n";
}

bool has_line_break(std::string_view text) { return text.find_first_of(std::string_view("\r\n\0", 3)) != text.npos; }

// A header or target made from a user's text must not be able to start another header.
bool is_safe(const ClientRequest& request) {
  bool safe = !has_line_break(request.method) && !has_line_break(request.target) &&
              request.target.find(' ') == std::string::npos;
  for (const auto& [name, value] : request.headers) safe = safe && !has_line_break(name) && !has_line_break(value);
  return safe;
}

// True if the server has neither closed the kept connection nor sent something unasked.
bool is_quiet(tcp::socket& socket) {
  char byte = 0;
  const ssize_t n = ::recv(socket.native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
}

// Bytes read and not yet used. A std::string would clear its room before each read, which for a token costs more than
// the reading.
class InputBuffer {
 public:
  // Room for kReadBytes more.
  char* room() {
    if (size_ + kReadBytes > capacity_) {
      const size_t capacity = std::max(size_ + kReadBytes, 2 * capacity_);
      auto larger = std::make_unique_for_overwrite<char[]>(capacity);
      if (size_ > 0) std::memcpy(larger.get(), bytes_.get(), size_);
      bytes_ = std::move(larger);
      capacity_ = capacity;
    }
    return bytes_.get() + size_;
  }
  void grow(size_t n) { size_ += n; }
  std::string_view view() const { return {bytes_.get(), size_}; }
  void keep_last(size_t n) {
    if (n > 0 && n < size_) std::memmove(bytes_.get(), bytes_.get() + (size_ - n), n);
    size_ = n;
  }

 private:
  std::unique_ptr<char[]> bytes_;
  size_t capacity_ = 0;
  size_t size_ = 0;
};

struct Call {
  CallId id;
  HttpUrl url;
  ClientRequest request;
  ClientHandlers handlers;
  std::optional<tcp::socket> socket;
  tcp::resolver resolver;
  asio::steady_timer timer;
  SteadyTime deadline{};       // of the present wait
  SteadyTime last_deadline{};  // of the whole call
  bool timed_out = false;
  bool cancelled = false;
  bool is_sent = false;   // the whole request
  bool has_left = false;  // our sending side is closed
  bool got_bytes = false;
  bool ended_in_order = false;  // the connection ended, and not by a reset
  ClientResponse response;
  SseParser sse;
  std::optional<Error> body_error;

  explicit Call(asio::io_context& io) : resolver(io), timer(io) {}

  void abort_io() {
    error_code ignored;
    resolver.cancel();
    if (socket) socket->close(ignored);
  }

  // Moves the deadline. The timer itself is touched only if it would fire too late.
  void expect_progress_within(std::chrono::milliseconds timeout) {
    deadline = std::min(std::chrono::steady_clock::now() + timeout, last_deadline);
    if (deadline < timer.expiry()) timer.expires_at(deadline);  // its waiter starts the wait anew
  }
};

}  // namespace

struct HttpClient::Impl : std::enable_shared_from_this<HttpClient::Impl> {
  struct IdleConnection {
    tcp::socket socket;
    SteadyTime since;
  };

  Impl(asio::io_context& context, HttpClientOptions client_options) : io(context), options(client_options) {}

  asio::io_context& io;
  HttpClientOptions options;
  uint64_t next_id = 1;
  std::unordered_map<CallId, std::shared_ptr<Call>> calls;
  std::unordered_map<std::string, std::deque<IdleConnection>> idle;  // by origin, oldest first
  SteadyTime last_sweep = std::chrono::steady_clock::now();

  static asio::awaitable<void> watch_deadline(std::shared_ptr<Call> call) {
    while (!call->cancelled && call->deadline != SteadyTime{}) {
      call->timer.expires_at(call->deadline);
      co_await call->timer.async_wait(kToken);
      if (call->deadline != SteadyTime{} && std::chrono::steady_clock::now() >= call->deadline) {
        call->timed_out = true;
        call->abort_io();
        co_return;
      }
    }
  }

  static asio::awaitable<void> run(std::shared_ptr<Impl> self, std::shared_ptr<Call> call) {
    asio::co_spawn(self->io, watch_deadline(call), asio::detached);
    Status status = make_error(ErrorKind::kInvalidArgument, "a request header or target has a line break or a space");
    if (is_safe(call->request)) status = co_await self->attempt(call, /*may_reuse=*/true);
    call->deadline = {};
    call->timer.cancel();
    if (call->cancelled) co_return;
    self->calls.erase(call->id);
    if (!call->handlers.on_done) co_return;
    if (status.ok()) {
      call->handlers.on_done(std::move(call->response));
    } else {
      call->handlers.on_done(status.error());
    }
  }

  asio::awaitable<Status> attempt(std::shared_ptr<Call> call, bool may_reuse) {
    call->is_sent = false;
    bool reused = may_reuse && take_idle(*call);
    if (!reused) {
      Status connected = co_await connect(*call);
      if (!connected.ok()) co_return connected;
    }
    Status status = co_await exchange(call);
    // A reset says that the server closed the kept connection before it read the request. After an orderly end it may
    // have read it, and even have died of it.
    const bool is_unread = reused && !call->got_bytes && !call->ended_in_order;
    if (!status.ok() && is_unread && !call->cancelled && !call->has_left && !call->timed_out) {
      co_return co_await attempt(call, /*may_reuse=*/false);
    }
    co_return status;
  }

  bool take_idle(Call& call) {
    const auto found = idle.find(call.url.origin());
    if (found == idle.end()) return false;
    std::deque<IdleConnection>& kept = found->second;
    while (!kept.empty()) {
      IdleConnection last = std::move(kept.back());
      kept.pop_back();
      if (std::chrono::steady_clock::now() - last.since > options.idle_keep || !is_quiet(last.socket)) continue;
      call.socket.emplace(std::move(last.socket));
      return true;
    }
    idle.erase(found);
    return false;
  }

  void keep(Call& call) {
    std::deque<IdleConnection>& kept = idle[call.url.origin()];
    const SteadyTime now = std::chrono::steady_clock::now();
    while (!kept.empty() &&
           (kept.size() >= options.max_idle_per_host || now - kept.front().since > options.idle_keep)) {
      kept.pop_front();
    }
    if (options.max_idle_per_host > 0) kept.push_back({std::move(*call.socket), now});
    call.socket.reset();
    if (now - last_sweep > options.idle_keep) sweep(now);
  }

  // A host that is not asked any more, as a worker that was removed, must not hold connections for ever.
  void sweep(SteadyTime now) {
    last_sweep = now;
    for (auto host = idle.begin(); host != idle.end();) {
      std::deque<IdleConnection>& kept = host->second;
      while (!kept.empty() && now - kept.front().since > options.idle_keep) kept.pop_front();
      host = kept.empty() ? idle.erase(host) : std::next(host);
    }
  }

  Error explain(const Call& call, std::string_view doing, const error_code& ec) const {
    if (call.timed_out) {
      return make_error(ErrorKind::kDeadlineExceeded, "{}: time-out while {}", call.url.origin(), doing);
    }
    return make_error(ErrorKind::kUnavailable, "{}: {} failed: {}", call.url.origin(), doing, ec.message());
  }

  Error not_connected(const Call& call, std::string_view doing, const error_code& ec) const {
    Error error = explain(call, doing, ec);
    error.code = kConnectFailed;
    return error;
  }

  asio::awaitable<Status> connect(Call& call) {
    call.expect_progress_within(call.request.connect_timeout);
    call.socket.emplace(io);
    error_code ec;
    std::vector<tcp::endpoint> endpoints;
    const asio::ip::address address = asio::ip::make_address(call.url.host, ec);
    if (!ec) {
      endpoints.emplace_back(address, call.url.port);
    } else {
      auto [resolve_ec, results] =
          co_await call.resolver.async_resolve(call.url.host, std::to_string(call.url.port), kToken);
      if (resolve_ec) co_return not_connected(call, "resolving the name", resolve_ec);
      for (const auto& result : results) endpoints.push_back(result.endpoint());
    }
    for (const tcp::endpoint& endpoint : endpoints) {
      if (call.timed_out || call.cancelled) break;
      error_code ignored;
      call.socket->close(ignored);
      auto [connect_ec] = co_await call.socket->async_connect(endpoint, kToken);
      ec = connect_ec;
      if (!ec) {
        tune_tcp_socket(call.socket->native_handle());
        co_return Status();
      }
    }
    co_return not_connected(call, "connecting", ec);
  }

  // Sends the request and reads the response on call.socket.
  asio::awaitable<Status> exchange(std::shared_ptr<Call> call) {
    call->expect_progress_within(call->request.idle_timeout);
    const std::string head = make_head(call->url, call->request);
    const std::array<asio::const_buffer, 2> output = {asio::buffer(head), asio::buffer(call->request.body)};
    // A failed write is not the end: a server that refuses a body answers and closes before it has read all of it.
    auto [write_ec, written] = co_await asio::async_write(*call->socket, output, kToken);

    call->is_sent = !write_ec;

    HttpParser parser = HttpParser::for_response(kMaxHeadBytes, call->request.method != "HEAD");
    InputBuffer input;
    while (!parser.done()) {
      if (input.view().size() > kMaxUnparsedBytes) co_return malformed(*call);
      auto [ec, n] = co_await call->socket->async_read_some(asio::buffer(input.room(), kReadBytes), kToken);
      input.grow(n);
      if (call->cancelled) co_return Status();
      if (ec) {
        call->ended_in_order = ec == asio::error::eof;
        const bool closed = call->ended_in_order && parser.put_eof().ok();
        if (!closed) co_return explain(*call, write_ec ? "sending the request" : "reading the response", ec);
        break;
      }
      call->got_bytes = true;
      call->expect_progress_within(call->request.idle_timeout);
      Status fed = feed(*call, parser, input);
      if (call->cancelled || !fed.ok()) co_return fed;
    }
    if (parser.head().keep_alive && input.view().empty() && !write_ec && !call->has_left) keep(*call);
    co_return Status();
  }

  Error malformed(const Call& call) const {
    return make_error(ErrorKind::kDataLoss, "{}: the response is not valid HTTP", call.url.origin());
  }

  // Parses as much of `input` as possible and removes it.
  Status feed(Call& call, HttpParser& parser, InputBuffer& input) {
    std::string_view rest = input.view();
    while (!rest.empty() && !parser.done()) {
      const bool had_head = parser.head_done();
      const Result<size_t> used = parser.put(rest);
      if (!used.ok()) return malformed(call);
      rest.remove_prefix(*used);
      if (call.body_error) return *call.body_error;
      if (call.cancelled) return {};
      if (!had_head && parser.head_done()) {
        if (parser.head().status < 200) {  // an interim response; the real one follows
          parser = HttpParser::for_response(kMaxHeadBytes, call.request.method != "HEAD");
          continue;
        }
        start_body(call, parser);
        if (call.cancelled) return {};
      } else if (*used == 0) {
        break;
      }
    }
    input.keep_last(rest.size());
    return {};
  }

  void start_body(Call& call, HttpParser& parser) {
    call.response.status = parser.head().status;
    call.response.headers = parser.head().headers;
    const std::string* type = find_header(call.response.headers, "content-type");
    const bool is_stream = type != nullptr && equal_ignoring_case(type->substr(0, 17), "text/event-stream");
    if (call.response.is_success() && is_stream && call.handlers.on_event) {
      parser.set_body_sink([&call](std::string_view bytes) {
        if (call.cancelled || call.body_error) return;
        Status fed = call.sse.feed(bytes, [&call](const SseEvent& event) {
          if (!call.cancelled) call.handlers.on_event(event);
        });
        if (!fed.ok()) call.body_error = fed.error();
      });
    } else if (call.response.is_success() && call.handlers.on_body) {
      parser.set_body_sink([&call](std::string_view bytes) {
        if (!call.cancelled) call.handlers.on_body(bytes);
      });
    } else {
      const size_t limit = options.max_body_bytes;
      parser.set_body_sink([&call, limit](std::string_view bytes) {
        if (call.response.body.size() + bytes.size() > limit) {
          call.body_error = make_error(ErrorKind::kDataLoss, "{}: the response is longer than the limit of {} bytes",
                                       call.url.origin(), limit);
        } else {
          call.response.body += bytes;
        }
      });
    }
    if (call.handlers.on_head) call.handlers.on_head(call.response);
  }
};

HttpClient::HttpClient(asio::io_context& io, HttpClientOptions options) : impl_(std::make_shared<Impl>(io, options)) {}

HttpClient::~HttpClient() {
  for (auto& [id, call] : impl_->calls) {
    call->cancelled = true;
    call->timer.cancel();
    call->abort_io();
  }
  impl_->calls.clear();
  impl_->idle.clear();
}

CallId HttpClient::start(const HttpUrl& url, ClientRequest request, ClientHandlers handlers) {
  const auto call = std::make_shared<Call>(impl_->io);
  call->id = CallId(impl_->next_id++);
  call->url = url;
  call->request = std::move(request);
  call->handlers = std::move(handlers);
  const bool has_total = call->request.total_timeout.count() > 0;
  call->last_deadline = has_total ? std::chrono::steady_clock::now() + call->request.total_timeout : SteadyTime::max();
  call->timer.expires_at(SteadyTime::max());
  call->expect_progress_within(call->request.connect_timeout);
  impl_->calls.emplace(call->id, call);
  asio::co_spawn(impl_->io, Impl::run(impl_, call), asio::detached);
  return call->id;
}

void HttpClient::cancel(CallId id) {
  const auto found = impl_->calls.find(id);
  if (found == impl_->calls.end()) return;
  const std::shared_ptr<Call> call = std::move(found->second);
  impl_->calls.erase(found);
  call->cancelled = true;
  call->timer.cancel();
  call->abort_io();
}

void HttpClient::leave(CallId id, std::chrono::milliseconds within) {
  const auto found = impl_->calls.find(id);
  if (found == impl_->calls.end()) return;
  Call& call = *found->second;
  if (!call.is_sent) return cancel(id);
  call.has_left = true;
  call.last_deadline = std::min(call.last_deadline, std::chrono::steady_clock::now() + within);
  call.expect_progress_within(within);
  error_code ignored;
  call.socket->shutdown(tcp::socket::shutdown_send, ignored);
}

size_t HttpClient::num_calls() const { return impl_->calls.size(); }

ClientRequest json_request(std::string target, std::string body) {
  ClientRequest request;
  request.method = "POST";
  request.target = std::move(target);
  request.headers.emplace_back("Content-Type", "application/json");
  request.body = std::move(body);
  return request;
}

Result<ClientResponse> fetch(const HttpUrl& url, ClientRequest request) {
  asio::io_context io(1);
  HttpClient client(io, {});
  Result<ClientResponse> outcome = make_error(ErrorKind::kInternal, "{}: the request never finished", url.origin());
  client.start(url, std::move(request),
               {.on_done = [&outcome](Result<ClientResponse> response) { outcome = std::move(response); }});
  io.run();
  return outcome;
}

}  // namespace tandem::api
