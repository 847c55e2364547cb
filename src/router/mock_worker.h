// For tests: a worker behind a real HTTP server that answers as a Tandem worker does, or fails in a chosen way.
// Its tokens are a function of the prompt, so a test can tell whose answer it got.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/api/http_server.h"
#include "src/base/check.h"
#include "src/engine/worker.h"

namespace tandem::router {

enum class MockFault {
  kNone,
  kStatus500,
  kStatus503,
  kStatus429,
  kStatus400,
  kHang,           // never answers
  kCut,            // closes the connection without an answer
  kCutInStream,    // decode: after the first token
  kErrorInStream,  // decode: an error event after the first token
  kHangInStream,   // decode: silent after the first token
};

inline TokenId mock_token(const std::vector<TokenId>& prompt, size_t index) {
  int64_t sum = static_cast<int64_t>(index);
  for (const TokenId token : prompt) sum += token;
  return static_cast<TokenId>(sum % 1000);
}

// Requests waiting at decode mocks for their KV blocks; shared by the mocks of one test.
struct MockKv {
  std::map<std::string, std::function<void()>> arrivals;
  uint64_t next_handle = 1;
};

class MockWorker {
 public:
  MockWorker(boost::asio::io_context& io, std::shared_ptr<MockKv> kv, uint16_t port = 0) : io_(io), kv_(std::move(kv)) {
    listen(port);
  }

  void listen(uint16_t port) {
    server_ = api::HttpServer::listen(io_, "127.0.0.1", port, {}).value();
    server_->add_route({"GET", "/health", false, [this](std::shared_ptr<api::HttpExchange> exchange) {
                          if (!healthy)
                            return exchange->respond({503, {}, "application/json", R"({"status":"loading"})"});
                          exchange->respond({200, {}, "application/json", R"({"status":"ok"})"});
                        }});
    server_->add_route({"POST", "/v1/completions", false,
                        [this](std::shared_ptr<api::HttpExchange> exchange) { answer(std::move(exchange)); }});
    port_ = server_->port();
    server_->start();
  }
  // As if the process was killed: every connection breaks, further ones are refused.
  void kill() { server_.reset(); }
  void revive() { listen(port_); }

  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }

  MockFault fault = MockFault::kNone;
  bool healthy = true;
  std::chrono::milliseconds token_gap{0};
  int num_requests = 0;  // that reached this worker
  int num_open = 0;      // legs that have neither ended nor been closed by the router
  std::vector<nlohmann::json> bodies;
  std::vector<api::HttpHeaders> headers;

 private:
  struct Stream {
    std::shared_ptr<api::HttpExchange> exchange;
    std::vector<TokenId> prompt;
    size_t max_tokens = 0;
    size_t sent = 0;
    std::unique_ptr<boost::asio::steady_timer> timer{};
    bool open = true;
  };

  void answer(std::shared_ptr<api::HttpExchange> exchange) {
    ++num_requests;
    bodies.push_back(nlohmann::json::parse(exchange->request().body));
    headers.push_back(exchange->request().headers);
    const nlohmann::json& body = bodies.back();
    switch (fault) {
      case MockFault::kStatus500:
        return respond_error(*exchange, ErrorKind::kInternal);
      case MockFault::kStatus503:
        return respond_error(*exchange, ErrorKind::kUnavailable);
      case MockFault::kStatus429:
        return respond_error(*exchange, ErrorKind::kResourceExhausted);
      case MockFault::kStatus400:
        return respond_error(*exchange, ErrorKind::kInvalidArgument);
      case MockFault::kCut:
        cut_.push_back(exchange);  // dropping it would be an answer
        return kill_connections();
      default:
        break;
    }
    const auto stream = std::make_shared<Stream>();
    stream->exchange = exchange;
    stream->prompt = body["prompt"].get<std::vector<TokenId>>();
    stream->max_tokens = body["max_tokens"].get<size_t>();
    stream->sent = body.value("resume_token_ids", nlohmann::json::array()).size();
    ++num_open;
    exchange->on_disconnect([this, stream] { close(*stream); });
    if (fault == MockFault::kHang) {
      hanging_.push_back(stream);
      return;
    }
    body["stream"].get<bool>() ? start_decode(stream, body) : finish_prefill(stream, body);
  }

  void respond_error(api::HttpExchange& exchange, ErrorKind kind) {
    exchange.respond(api::error_response(make_error(kind, "the mock fails")));
  }
  void kill_connections() {
    boost::asio::post(io_, [this] { kill(), revive(), cut_.clear(); });
  }

  void close(Stream& stream) {
    if (!std::exchange(stream.open, false)) return;
    --num_open;
    if (stream.timer) stream.timer->cancel();
  }

  void finish_prefill(const std::shared_ptr<Stream>& stream, const nlohmann::json& body) {
    const nlohmann::json params = body.value("kv_transfer_params", nlohmann::json::object());
    nlohmann::json response = {{"choices", {{{"text", ""}, {"finish_reason", "length"}}}}};
    if (params.value("remote_request_id", nlohmann::json()).is_string()) {  // push: hand the blocks to decode
      const auto arrival = kv_->arrivals.extract(params["remote_request_id"].get<std::string>());
      if (!arrival.empty()) arrival.mapped()();
    } else if (params.value("do_remote_decode", false)) {  // pull: publish
      response["kv_transfer_params"] = {{"do_remote_prefill", true}, {"remote_request_id", "pull-1"}, {"vendor", {7}}};
    }
    close(*stream);
    stream->exchange->respond({200, {}, "application/json", response.dump()});
  }

  void start_decode(const std::shared_ptr<Stream>& stream, const nlohmann::json& body) {
    stream->exchange->start_stream({200, {}, "text/event-stream", ""});
    const nlohmann::json params = body.value("kv_transfer_params", nlohmann::json::object());
    if (params.value("transfer_mode", "") != "push") return send_token(stream);
    const std::string handle = "push-" + std::to_string(kv_->next_handle++);
    kv_->arrivals[handle] = [this, stream] { send_token(stream); };
    const nlohmann::json address = {{"do_remote_decode", true}, {"remote_request_id", handle}, {"remote_port", 1}};
    write(*stream, {{"choices", nlohmann::json::array()}, {"kv_transfer_params", address}});
  }

  void send_token(const std::shared_ptr<Stream>& stream) {
    if (!stream->open) return;
    if (stream->sent == 1 && fault == MockFault::kCutInStream) return kill_connections();
    if (stream->sent == 1 && fault == MockFault::kErrorInStream) {
      write_text(*stream, api::error_body(make_error(ErrorKind::kInternal, "the mock fails"), 500));
      close(*stream);
      return stream->exchange->finish();
    }
    if (stream->sent == 1 && fault == MockFault::kHangInStream) return hanging_.push_back(stream);
    const bool last = stream->sent + 1 == stream->max_tokens;
    nlohmann::json choice = {{"index", 0}, {"text", ""}, {"token_ids", {mock_token(stream->prompt, stream->sent++)}}};
    choice["finish_reason"] = last ? nlohmann::json("length") : nlohmann::json();
    write(*stream, {{"choices", {choice}}, {"usage", {{"prompt_tokens", stream->prompt.size()}}}});
    if (last) {
      write_text(*stream, "[DONE]");
      close(*stream);
      return stream->exchange->finish();
    }
    stream->timer = std::make_unique<boost::asio::steady_timer>(io_, token_gap);
    stream->timer->async_wait([this, stream](const boost::system::error_code& error) {
      if (!error) send_token(stream);
    });
  }

  void write(Stream& stream, const nlohmann::json& chunk) { write_text(stream, chunk.dump()); }
  void write_text(Stream& stream, const std::string& data) { stream.exchange->write("data: " + data + "\n\n"); }

  boost::asio::io_context& io_;
  std::shared_ptr<MockKv> kv_;
  std::unique_ptr<api::HttpServer> server_;
  uint16_t port_ = 0;
  std::vector<std::shared_ptr<Stream>> hanging_;
  std::vector<std::shared_ptr<api::HttpExchange>> cut_;
};

}  // namespace tandem::router
