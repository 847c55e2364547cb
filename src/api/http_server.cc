// Each connection is two coroutines. receive() reads all the time, also while a request runs, because the end of the
// stream is the only sign of a client that left. serve() takes heads and bodies out of what was read, calls handlers
// and writes what they answer. All deadlines are fields that one ticker looks at, so that a written token costs no
// timer operation.
#include "src/api/http_server.h"

#include <fcntl.h>

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
#include <ctime>
#include <optional>
#include <unordered_set>

#include "src/api/http_parser.h"
#include "src/api/socket_options.h"
#include "src/base/log.h"

namespace tandem::api {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using SteadyClockT = std::chrono::steady_clock;
using SteadyTime = SteadyClockT::time_point;

namespace {

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);
constexpr std::chrono::milliseconds kTick{50};
constexpr std::chrono::milliseconds kAcceptRetry{100};      // after EMFILE and the like
constexpr std::chrono::milliseconds kLingerTimeout{1'000};  // for the client to read a refusal and close
constexpr size_t kReadBytes = 64UL << 10;
constexpr size_t kWriteSliceBytes = 64UL << 10;
constexpr size_t kMaxInputBytes = 128UL << 10;  // read and not yet used, per connection

// Wakes one waiting coroutine. The waiter checks its condition before and after, so a notify() without a waiter is
// not lost.
class Signal {
 public:
  explicit Signal(asio::io_context& io) : timer_(io) {}
  void notify() { timer_.cancel(); }
  asio::awaitable<void> wait() {
    timer_.expires_at(SteadyTime::max());
    co_await timer_.async_wait(kToken);
  }

 private:
  asio::steady_timer timer_;
};

std::string_view method_label(std::string_view method) {
  static constexpr std::array<std::string_view, 7> kUsual = {"GET", "POST",   "HEAD", "OPTIONS",
                                                             "PUT", "DELETE", "PATCH"};
  const auto found = std::find(kUsual.begin(), kUsual.end(), method);
  return found == kUsual.end() ? "other" : *found;
}

Error http_fault(ErrorKind kind, std::string code, std::string message) {
  return Error{kind, std::move(message), "", std::move(code)};
}

}  // namespace

namespace {
class Connection;
class Exchange;
}  // namespace

struct HttpServer::Impl : std::enable_shared_from_this<HttpServer::Impl> {
  Impl(asio::io_context& context, HttpServerOptions server_options)
      : io(context), options(std::move(server_options)), acceptor(io), ticker(io) {}

  asio::io_context& io;
  HttpServerOptions options;
  std::vector<HttpRoute> routes;
  tcp::acceptor acceptor;
  asio::steady_timer ticker;
  std::unordered_set<Connection*> connections;  // each keeps itself alive while its coroutines run
  size_t body_bytes = 0;                        // of all requests
  bool draining = false;
  bool closed = false;
  std::function<void()> on_idle;
  std::array<char, kReadBytes> scratch;
  std::string date;
  int64_t date_second = -1;

  static asio::awaitable<void> accept_loop(std::shared_ptr<Impl> self);
  static asio::awaitable<void> tick_loop(std::shared_ptr<Impl> self);
  std::string_view current_date();
  void remove(Connection* connection);
};

namespace {

using ServerImpl = HttpServer::Impl;

// What a connection and the exchange it runs know of each other.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<ServerImpl> server, tcp::socket socket)
      : server_(std::move(server)),
        options_(server_->options),
        socket_(std::move(socket)),
        input_signal_(server_->io),
        space_signal_(server_->io),
        output_signal_(server_->io) {}

  void start();
  void check_deadline(SteadyTime now);
  // Ends the connection at once; a running request is told.
  void cut();
  // Ends it now if idle, after the present response otherwise.
  void retire();

  // For Exchange.
  void begin_response(const HttpResponse& head, std::optional<size_t> length);
  void send_body(std::string_view bytes, bool is_stream);
  void end_response();

 private:
  enum class Phase { kIdle, kHead, kBody, kRunning, kLingering };
  // Not an aggregate: g++ 12 copies braced temporaries in coroutines bit by bit and destroys both copies.
  struct Fault {
    Fault(Error e, int http_code, HttpHeaders extra_headers, bool is_broken)
        : error(std::move(e)), status(http_code), headers(std::move(extra_headers)), broken_framing(is_broken) {}
    Error error;
    int status;
    HttpHeaders headers;
    bool broken_framing;  // what follows on this connection cannot be trusted
  };

  static Fault framing_fault(ErrorKind kind, int status, std::string code, std::string message) {
    return Fault(http_fault(kind, std::move(code), std::move(message)), status, {}, true);
  }

  static asio::awaitable<void> receive(std::shared_ptr<Connection> self);
  static asio::awaitable<void> serve(std::shared_ptr<Connection> self);
  asio::awaitable<bool> serve_one();
  // Both return false while more input is needed; then either what they were asked for is there, or `fault` is set,
  // or neither, if the connection ended or idled out.
  bool take_head(std::string& block, std::optional<Fault>& fault);
  bool take_body(HttpParser& parser, HttpRequest& request, std::optional<Fault>& fault);
  asio::awaitable<void> write_response();
  asio::awaitable<void> refuse(Fault fault);
  asio::awaitable<void> linger();
  struct Admission {
    HttpRequest request;               // without body
    const HttpRoute* route = nullptr;  // null: OPTIONS, to be answered with `allow`
    std::string allow;
  };
  std::optional<Fault> admit(Admission& admission);
  void peer_left();
  void complete_record(int status);
  void set_deadline(std::chrono::milliseconds timeout) { deadline_ = SteadyClockT::now() + timeout; }

  std::shared_ptr<ServerImpl> server_;
  const HttpServerOptions& options_;
  tcp::socket socket_;
  Signal input_signal_;   // receive() → serve()
  Signal space_signal_;   // serve() → receive()
  Signal output_signal_;  // exchange → serve()

  Phase phase_ = Phase::kIdle;
  SteadyTime deadline_ = SteadyTime::max();
  SteadyTime body_deadline_{};
  size_t head_searched_ = 0;  // bytes of input_ that hold no end of a head
  bool timed_out_ = false;    // in kIdle, kHead or kBody
  bool input_ended_ = false;
  bool broken_ = false;  // nothing can be sent any more
  bool discard_input_ = false;
  bool keep_alive_ = true;
  std::string input_;

  // Of the present request.
  Exchange* exchange_ = nullptr;
  HttpHead head_;
  std::string_view route_label_;
  SteadyTime began_{};
  size_t counted_body_bytes_ = 0;
  std::function<void()> on_unsent_;  // of a complete answer
  int response_status_ = 0;
  bool response_begun_ = false;
  bool response_done_ = false;
  bool chunked_ = false;
  std::string output_;
  std::string writing_;
  size_t written_ = 0;  // of writing_

  friend class Exchange;
};

class Exchange final : public HttpExchange {
 public:
  Exchange(std::shared_ptr<Connection> connection, HttpRequest request)
      : connection_(std::move(connection)), request_(std::move(request)) {
    connection_->exchange_ = this;
  }
  ~Exchange() override {
    if (!connection_) return;
    respond(error_response(make_error(ErrorKind::kInternal, "the request was dropped without an answer")));
  }

  HttpRequest& request() override { return request_; }

  void respond(HttpResponse response) override {
    if (!connection_) return;
    connection_->begin_response(response, response.body.size());
    if (connection_->head_.method != "HEAD") connection_->send_body(response.body, /*is_stream=*/false);
    finish();
  }
  void start_stream(HttpResponse head) override {
    if (connection_) connection_->begin_response(head, std::nullopt);
  }
  void write(std::string_view bytes) override {
    if (connection_ && !bytes.empty()) connection_->send_body(bytes, /*is_stream=*/true);
  }
  void finish() override {
    if (!connection_) return;
    const std::shared_ptr<Connection> connection = std::move(connection_);
    on_disconnect_ = nullptr;
    connection->on_unsent_ = std::move(on_unsent_);
    connection->exchange_ = nullptr;
    connection->end_response();
  }
  bool is_open() const override { return connection_ != nullptr; }
  void on_disconnect(std::function<void()> callback) override {
    if (connection_) on_disconnect_ = std::move(callback);
  }

  void on_unsent(std::function<void()> callback) override {
    if (connection_) on_unsent_ = std::move(callback);
  }

  void detach() {
    connection_->exchange_ = nullptr;
    connection_.reset();
    const std::function<void()> callback = std::move(on_disconnect_);
    if (callback) callback();
  }

 private:
  std::shared_ptr<Connection> connection_;  // null once the answer is complete or the client gone
  HttpRequest request_;
  std::function<void()> on_disconnect_;
  std::function<void()> on_unsent_;
};

void Connection::start() {
  server_->connections.insert(this);
  set_deadline(options_.idle_timeout);
  asio::co_spawn(server_->io, receive(shared_from_this()), asio::detached);
  asio::co_spawn(server_->io, serve(shared_from_this()), asio::detached);
}

void Connection::check_deadline(SteadyTime now) {
  if (now < deadline_) return;
  deadline_ = SteadyTime::max();
  if (phase_ == Phase::kRunning) {
    log_debug("api", "cut a client that reads too slowly");
    cut();
  } else {
    timed_out_ = true;
    input_signal_.notify();
  }
}

void Connection::cut() {
  broken_ = true;
  error_code ignored;
  socket_.close(ignored);
  input_signal_.notify();
  space_signal_.notify();
  output_signal_.notify();
  if (exchange_ != nullptr) exchange_->detach();
}

void Connection::retire() {
  keep_alive_ = false;
  if (phase_ != Phase::kIdle) return;
  timed_out_ = true;
  input_signal_.notify();
}

// The client closed its side. Whole answers still go out, since a reader may have half-closed; unfinished ones stop.
void Connection::peer_left() {
  input_ended_ = true;
  keep_alive_ = false;
  input_signal_.notify();
  if (exchange_ != nullptr) cut();
}

asio::awaitable<void> Connection::receive(std::shared_ptr<Connection> self) {
  Connection& c = *self;
  while (!c.broken_) {
    if (!c.discard_input_ && c.input_.size() >= kMaxInputBytes) {
      co_await c.space_signal_.wait();
      continue;
    }
    auto [wait_ec] = co_await c.socket_.async_wait(tcp::socket::wait_read, kToken);
    if (wait_ec || c.broken_) break;
    error_code ec;
    const size_t n = c.socket_.receive(asio::buffer(c.server_->scratch), 0, ec);
    if (ec == asio::error::would_block) continue;
    if (ec) {
      c.peer_left();
      break;
    }
    if (!c.discard_input_) c.input_.append(c.server_->scratch.data(), n);
    if (c.phase_ == Phase::kRunning && c.input_.size() > c.options_.max_pipelined_bytes) {
      c.discard_input_ = true;
      c.keep_alive_ = false;
      c.input_ = std::string();
    }
    c.input_signal_.notify();
  }
}

asio::awaitable<void> Connection::serve(std::shared_ptr<Connection> self) {
  while (!self->broken_ && self->keep_alive_) {
    const bool go_on = co_await self->serve_one();
    if (!go_on) break;
  }
  if (!self->broken_) co_await self->linger();
  self->cut();
  self->server_->remove(self.get());
}

asio::awaitable<bool> Connection::serve_one() {
  head_ = {};
  route_label_ = "none";
  response_begun_ = response_done_ = false;
  counted_body_bytes_ = 0;

  phase_ = Phase::kIdle;
  timed_out_ = false;
  head_searched_ = 0;
  set_deadline(options_.idle_timeout);
  std::string block;
  std::optional<Fault> fault;
  while (!take_head(block, fault)) co_await input_signal_.wait();
  if (broken_ || (!fault && block.empty())) co_return false;
  began_ = SteadyClockT::now();
  if (fault) {
    co_await refuse(std::move(*fault));
    co_return false;
  }

  HttpParser parser = HttpParser::for_request(static_cast<uint32_t>(options_.max_head_bytes + 4));
  Status status = check_request_head(block, options_.max_headers, options_.max_uri_bytes);
  if (status.ok()) {
    const Result<size_t> used = parser.put(block);
    if (!used.ok() || *used != block.size() || !parser.head_done()) {
      status = http_fault(ErrorKind::kInvalidArgument, "bad_request", "the request head is malformed");
    } else {
      head_ = parser.head();
      status = check_request_fields(head_);
    }
  }
  if (!status.ok()) {
    const std::string& code = status.error().code;
    int http_code = http_status(status.error());
    if (code == "too_many_headers") http_code = 431;
    if (code == "uri_too_long") http_code = 414;
    fault.emplace(status.error(), http_code, HttpHeaders(), true);
    co_await refuse(std::move(*fault));
    co_return false;
  }

  Admission admission;
  fault = admit(admission);
  const bool has_body = head_.chunked || head_.content_length.value_or(0) > 0;
  if (!fault && !parser.done()) {
    phase_ = Phase::kBody;
    timed_out_ = false;
    body_deadline_ = SteadyClockT::now() + options_.body_timeout;
    parser.set_body_limit(options_.max_body_bytes);
    parser.set_body_sink([&admission](std::string_view bytes) { admission.request.body += bytes; });
    if (input_.empty() && find_header(head_.headers, "expect") != nullptr) {
      static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
      co_await asio::async_write(socket_, asio::buffer(kContinue), kToken);
    }
    while (!take_body(parser, admission.request, fault)) co_await input_signal_.wait();
  }
  if (!fault && (broken_ || !parser.done())) {
    keep_alive_ = false;  // the client left inside its body
  } else if (fault) {
    if (has_body) fault->broken_framing = true;  // the rest of the body is not a request
    co_await refuse(std::move(*fault));
  } else {
    keep_alive_ = keep_alive_ && head_.keep_alive && head_.version >= 11;
    phase_ = Phase::kRunning;
    deadline_ = SteadyTime::max();
    auto exchange = std::make_shared<Exchange>(shared_from_this(), std::move(admission.request));
    if (admission.route == nullptr) {
      HttpResponse response;
      response.status = 204;
      response.headers.emplace_back("Allow", admission.allow);
      exchange->respond(std::move(response));
    } else {
      admission.route->handler(std::move(exchange));
    }
    exchange.reset();
    if (input_ended_ && exchange_ != nullptr) cut();  // it left before the handler began
    co_await write_response();
  }
  server_->body_bytes -= counted_body_bytes_;
  counted_body_bytes_ = 0;
  co_return !broken_ && keep_alive_;
}

bool Connection::take_head(std::string& block, std::optional<Fault>& fault) {
  while (phase_ == Phase::kIdle && input_.starts_with("\r\n")) input_.erase(0, 2);
  if (!input_.empty() && input_ != "\r") {
    if (phase_ == Phase::kIdle) {
      phase_ = Phase::kHead;
      set_deadline(options_.head_timeout);
    }
    const bool is_method = (input_[0] >= 'A' && input_[0] <= 'Z') || (input_[0] >= 'a' && input_[0] <= 'z');
    if (!is_method) {
      fault = framing_fault(ErrorKind::kInvalidArgument, 400, "bad_request", "this is not an HTTP/1.1 request");
      return true;
    }
    const size_t end = input_.find("\r\n\r\n", head_searched_);
    const size_t size = end == std::string::npos ? input_.size() : end + 4;
    if (size > options_.max_head_bytes) {
      if (input_.find("\r\n") > options_.max_uri_bytes + 64) {
        fault = framing_fault(ErrorKind::kInvalidArgument, 414, "uri_too_long",
                              fmt::format("the request target is over the limit of {} bytes", options_.max_uri_bytes));
      } else {
        fault = framing_fault(ErrorKind::kInvalidArgument, 431, "headers_too_large",
                              fmt::format("the request head is over the limit of {} bytes", options_.max_head_bytes));
      }
      return true;
    }
    if (end != std::string::npos) {
      block = input_.substr(0, size);
      input_.erase(0, size);
      space_signal_.notify();
      return true;
    }
    head_searched_ = input_.size() < 3 ? 0 : input_.size() - 3;
  }
  if (timed_out_ && phase_ == Phase::kHead) {
    fault =
        framing_fault(ErrorKind::kDeadlineExceeded, 408, "request_timeout", "the request head did not arrive in time");
  }
  return timed_out_ || input_ended_ || broken_;
}

// Decides by the head alone whether the request may run, before a byte of its body is taken.
std::optional<Connection::Fault> Connection::admit(Admission& admission) {
  const auto fault = [](ErrorKind kind, int status, std::string code, std::string message, HttpHeaders headers = {}) {
    return Fault(http_fault(kind, std::move(code), std::move(message)), status, std::move(headers), false);
  };
  HttpRequest& request = admission.request;
  const HttpRoute*& route = admission.route;
  std::string& allow = admission.allow;
  const HttpHead& head = head_;
  std::string_view target = head.target;
  if (target.starts_with("http://")) {  // absolute form: only its path counts
    const size_t slash = target.find('/', 7);
    target = slash == std::string_view::npos ? "/" : target.substr(slash);
  }
  target = target.substr(0, target.find('?'));
  request.method = head.method == "HEAD" ? "GET" : head.method;
  request.path = target;
  request.headers = head.headers;

  for (const HttpRoute& candidate : server_->routes) {
    std::string_view pattern = candidate.path;
    const bool is_prefix = pattern.ends_with('*');
    if (is_prefix) pattern.remove_suffix(1);
    const bool matches = is_prefix ? target.starts_with(pattern) && target.size() > pattern.size() : target == pattern;
    if (!matches) continue;
    route_label_ = candidate.path;
    allow += (allow.empty() ? "" : ", ") + candidate.method + (candidate.method == "GET" ? ", HEAD" : "");
    if (candidate.method != request.method) continue;
    route = &candidate;
    if (is_prefix) request.path_tail = target.substr(pattern.size());
  }
  if (allow.empty()) {
    return fault(ErrorKind::kNotFound, 404, "", fmt::format("there is no route {}", quote_for_message(target)));
  }
  allow += ", OPTIONS";
  if (route == nullptr && head.method == "OPTIONS") return std::nullopt;
  if (route == nullptr) {
    return fault(ErrorKind::kInvalidArgument, 405, "method_not_allowed",
                 fmt::format("the method {} is not allowed here", quote_for_message(head.method)), {{"Allow", allow}});
  }
  if (route->needs_auth && options_.authorize) {
    if (Status status = options_.authorize(request); !status.ok()) {
      return Fault(status.error(), http_status(status.error()), {}, false);
    }
  }
  if (server_->draining) {
    keep_alive_ = false;
    return fault(ErrorKind::kUnavailable, 503, "draining", "the server is shutting down");
  }
  if (const std::string* expect = find_header(head.headers, "expect")) {
    if (!equal_ignoring_case(*expect, "100-continue")) {
      return fault(ErrorKind::kInvalidArgument, 417, "expectation_failed", "only Expect: 100-continue is supported");
    }
  }
  if (const std::string* encoding = find_header(head.headers, "content-encoding")) {
    if (!equal_ignoring_case(*encoding, "identity")) {
      return fault(ErrorKind::kInvalidArgument, 415, "unsupported_media_type", "compressed bodies are not supported");
    }
  }
  const std::string* type = find_header(head.headers, "content-type");
  if (request.method == "POST" && (type == nullptr || !is_json_type(*type))) {
    return fault(ErrorKind::kInvalidArgument, 415, "unsupported_media_type", "Content-Type must be application/json");
  }
  if (head.content_length.value_or(0) > options_.max_body_bytes) {
    return fault(ErrorKind::kTooLarge, 413, "request_too_large",
                 fmt::format("the body has {} bytes, the limit is {}", *head.content_length, options_.max_body_bytes));
  }
  return std::nullopt;
}

bool Connection::take_body(HttpParser& parser, HttpRequest& request, std::optional<Fault>& fault) {
  const size_t old_size = request.body.size();
  std::string_view rest = input_;
  while (!rest.empty() && !parser.done()) {
    const Result<size_t> used = parser.put(rest);
    if (!used.ok() && used.error().kind == ErrorKind::kTooLarge) {
      fault = framing_fault(ErrorKind::kTooLarge, 413, "request_too_large",
                            fmt::format("the body is over the limit of {} bytes", options_.max_body_bytes));
      return true;
    }
    if (!used.ok() || (*used == 0 && rest.size() > options_.max_head_bytes)) {
      fault = framing_fault(ErrorKind::kInvalidArgument, 400, "bad_request", "the request body is malformed");
      return true;
    }
    if (*used == 0) break;
    rest.remove_prefix(*used);
  }
  input_.erase(0, input_.size() - rest.size());
  space_signal_.notify();
  counted_body_bytes_ += request.body.size() - old_size;
  server_->body_bytes += request.body.size() - old_size;
  if (server_->body_bytes > options_.max_total_body_bytes) {
    fault = framing_fault(ErrorKind::kUnavailable, 503, "server_is_overloaded",
                          "too many large requests at once, try again later");
    return true;
  }
  if (parser.done() || input_ended_ || broken_) return true;
  if (timed_out_) {
    fault =
        framing_fault(ErrorKind::kDeadlineExceeded, 408, "request_timeout", "the request body did not arrive in time");
    return true;
  }
  deadline_ = std::min(body_deadline_, SteadyClockT::now() + options_.body_stall_timeout);
  return false;
}

asio::awaitable<void> Connection::refuse(Fault fault) {
  HttpResponse response = error_response(fault.error, fault.status);
  for (auto& header : fault.headers) response.headers.push_back(std::move(header));
  if (fault.broken_framing || !head_.keep_alive || head_.version < 11) keep_alive_ = false;
  phase_ = Phase::kRunning;
  begin_response(response, response.body.size());
  if (head_.method != "HEAD") send_body(response.body, /*is_stream=*/false);
  end_response();
  co_await write_response();
}

void Connection::begin_response(const HttpResponse& head, std::optional<size_t> length) {
  CHECK(!response_begun_);
  response_begun_ = true;
  response_status_ = head.status;
  chunked_ = !length && head_.version >= 11;
  if (!length && !chunked_) keep_alive_ = false;  // HTTP/1.0: the stream ends with the connection
  output_ +=
      fmt::format("HTTP/1.1 {} {}\r\nDate: {}\r\n", head.status, status_text(head.status), server_->current_date());
  if (head.status != 204) output_ += fmt::format("Content-Type: {}\r\n", head.content_type);
  if (chunked_) output_ += "Transfer-Encoding: chunked\r\n";
  if (length && head.status != 204) output_ += fmt::format("Content-Length: {}\r\n", *length);
  for (const auto& [name, value] : head.headers) output_ += fmt::format("{}: {}\r\n", name, value);
  output_ += keep_alive_ ? "\r\n" : "Connection: close\r\n\r\n";
  output_signal_.notify();
}

void Connection::send_body(std::string_view bytes, bool is_stream) {
  if (is_stream) {
    const size_t buffered = writing_.size() - written_ + output_.size() + bytes.size();
    if (buffered > options_.max_buffered_bytes) {
      log_debug("api", "cut a client with {} unread bytes", buffered);
      cut();
      return;
    }
  }
  if (chunked_) {
    fmt::format_to(std::back_inserter(output_), "{:x}\r\n", bytes.size());
    output_ += bytes;
    output_ += "\r\n";
  } else {
    output_ += bytes;
  }
  output_signal_.notify();
}

void Connection::end_response() {
  if (chunked_) output_ += "0\r\n\r\n";
  response_done_ = true;
  output_signal_.notify();
}

asio::awaitable<void> Connection::write_response() {
  while (!broken_) {
    if (output_.empty()) {
      if (response_done_) break;
      co_await output_signal_.wait();
      continue;
    }
    writing_ = std::move(output_);
    output_.clear();
    written_ = 0;
    while (!broken_ && written_ < writing_.size()) {
      set_deadline(options_.write_timeout);
      const size_t slice = std::min(kWriteSliceBytes, writing_.size() - written_);
      auto [ec, n] = co_await asio::async_write(socket_, asio::buffer(writing_.data() + written_, slice), kToken);
      written_ += n;
      if (ec) cut();
    }
    deadline_ = SteadyTime::max();
    writing_.clear();
    written_ = 0;
  }
  const bool complete = !broken_ && response_done_;
  const std::function<void()> on_unsent = std::exchange(on_unsent_, nullptr);
  if (!complete && on_unsent) on_unsent();
  if (options_.on_complete && !server_->closed) {
    const double seconds = std::chrono::duration<double>(SteadyClockT::now() - began_).count();
    options_.on_complete({route_label_, method_label(head_.method), complete ? response_status_ : 499, seconds});
  }
}

// Lets the client read the last answer: closing with unread input would make the kernel drop it.
asio::awaitable<void> Connection::linger() {
  error_code ignored;
  socket_.shutdown(tcp::socket::shutdown_send, ignored);
  phase_ = Phase::kLingering;
  timed_out_ = false;
  discard_input_ = true;
  input_.clear();
  space_signal_.notify();
  set_deadline(kLingerTimeout);
  while (!input_ended_ && !timed_out_ && !broken_) co_await input_signal_.wait();
}

}  // namespace

asio::awaitable<void> HttpServer::Impl::accept_loop(std::shared_ptr<Impl> self) {
  asio::steady_timer pause(self->io);
  while (self->acceptor.is_open()) {
    auto [ec, socket] = co_await self->acceptor.async_accept(kToken);
    if (ec == asio::error::operation_aborted || !self->acceptor.is_open()) break;
    if (ec) {
      log_warning("api", "cannot accept a connection: {}", ec.message());
      pause.expires_after(kAcceptRetry);
      co_await pause.async_wait(kToken);
      continue;
    }
    error_code ignored;
    socket.non_blocking(true, ignored);
    tune_tcp_socket(socket.native_handle());
    if (self->options.send_buffer_bytes > 0) {
      socket.set_option(asio::socket_base::send_buffer_size(self->options.send_buffer_bytes), ignored);
    }
    if (self->connections.size() >= self->options.max_connections) {
      static const std::string kFull = [] {
        const std::string body =
            error_body(http_fault(ErrorKind::kUnavailable, "server_is_overloaded", "too many connections"), 503);
        return fmt::format(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {}\r\n"
            "Retry-After: 1\r\nConnection: close\r\n\r\n{}",
            body.size(), body);
      }();
      socket.send(asio::buffer(kFull), 0, ignored);
      continue;
    }
    std::make_shared<Connection>(self, std::move(socket))->start();
  }
}

asio::awaitable<void> HttpServer::Impl::tick_loop(std::shared_ptr<Impl> self) {
  std::vector<std::shared_ptr<Connection>> snapshot;  // a deadline may end connections
  while (!self->closed) {
    self->ticker.expires_after(kTick);
    co_await self->ticker.async_wait(kToken);
    const SteadyTime now = SteadyClockT::now();
    snapshot.clear();
    for (Connection* connection : self->connections) snapshot.push_back(connection->shared_from_this());
    for (const auto& connection : snapshot) connection->check_deadline(now);
  }
}

std::string_view HttpServer::Impl::current_date() {
  const std::time_t now = std::time(nullptr);
  if (now != date_second) {
    date_second = now;
    std::tm parts{};
    ::gmtime_r(&now, &parts);
    std::array<char, 64> text{};
    date.assign(text.data(), std::strftime(text.data(), text.size(), "%a, %d %b %Y %H:%M:%S GMT", &parts));
  }
  return date;
}

void HttpServer::Impl::remove(Connection* connection) {
  connections.erase(connection);
  if (draining && connections.empty() && on_idle) {
    const std::function<void()> callback = std::move(on_idle);
    on_idle = nullptr;
    callback();
  }
}

HttpServer::HttpServer(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() { close(); }

Result<std::unique_ptr<HttpServer>> HttpServer::listen(asio::io_context& io, const std::string& host, uint16_t port,
                                                       HttpServerOptions options) {
  error_code ec;
  const asio::ip::address address = asio::ip::make_address(host == "localhost" ? "127.0.0.1" : host, ec);
  if (ec) return invalid_argument("host", "the address to listen on is '{}', must be an IP address", host);
  auto impl = std::make_shared<Impl>(io, std::move(options));
  const tcp::endpoint endpoint(address, port);
  impl->acceptor.open(endpoint.protocol(), ec);
  if (!ec) impl->acceptor.set_option(tcp::acceptor::reuse_address(true), ec);
  if (!ec) impl->acceptor.bind(endpoint, ec);
  if (!ec) impl->acceptor.listen(asio::socket_base::max_listen_connections, ec);
  if (ec) {
    return make_error(ErrorKind::kUnavailable,
                      "cannot listen on {}:{}: {}; stop the other program or choose another "
                      "--port",
                      host, port, ec.message());
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

Result<std::unique_ptr<HttpServer>> HttpServer::share(asio::io_context& io, const HttpServer& first,
                                                      HttpServerOptions options) {
  error_code ec;
  auto impl = std::make_shared<Impl>(io, std::move(options));
  const int socket = ::fcntl(first.impl_->acceptor.native_handle(), F_DUPFD_CLOEXEC, 0);
  if (socket < 0) return make_error(ErrorKind::kUnavailable, "cannot share the listening socket; are there too many files?");
  impl->acceptor.assign(first.impl_->acceptor.local_endpoint(ec).protocol(), socket, ec);
  CHECK(!ec);
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

uint16_t HttpServer::port() const {
  error_code ignored;
  return impl_->acceptor.local_endpoint(ignored).port();
}

void HttpServer::add_route(HttpRoute route) { impl_->routes.push_back(std::move(route)); }
const std::vector<HttpRoute>& HttpServer::routes() const { return impl_->routes; }

void HttpServer::start() {
  asio::co_spawn(impl_->io, Impl::accept_loop(impl_), asio::detached);
  asio::co_spawn(impl_->io, Impl::tick_loop(impl_), asio::detached);
}

void HttpServer::drain(std::function<void()> on_idle) {
  impl_->draining = true;
  impl_->on_idle = std::move(on_idle);
  error_code ignored;
  impl_->acceptor.close(ignored);
  std::vector<std::shared_ptr<Connection>> snapshot;
  for (Connection* connection : impl_->connections) snapshot.push_back(connection->shared_from_this());
  for (const auto& connection : snapshot) connection->retire();
  if (snapshot.empty()) impl_->remove(nullptr);
}

void HttpServer::close() {
  impl_->closed = true;
  error_code ignored;
  impl_->acceptor.close(ignored);
  impl_->ticker.cancel();
  std::vector<std::shared_ptr<Connection>> snapshot;
  for (Connection* connection : impl_->connections) snapshot.push_back(connection->shared_from_this());
  for (const auto& connection : snapshot) connection->cut();
}

size_t HttpServer::num_connections() const { return impl_->connections.size(); }

}  // namespace tandem::api
