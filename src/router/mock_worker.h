// For tests: a worker behind a real HTTP server that answers as a Tandem worker does, or fails in a chosen way.
// Its tokens are a function of the prompt, so a test can tell whose answer it got.
#pragma once

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "src/api/frontend.h"
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
  kRefuse,    // nobody listens
  kGarbage,   // bytes that are not HTTP
  kHang,      // never answers
  kFreeze,    // as kHang, and health probes are not answered either
  kCut,       // closes the connection without an answer
  kNoParams,  // prefill, pull: an answer without kv_transfer_params
  kEarly,     // decode, push: a token before it has reserved blocks
  // Within the answer. Decode: after the first token. Prefill: after the first byte; nothing has been handed over.
  kCutInStream,
  kErrorInStream,  // an error object
  kHangInStream,
  kFreezeInStream,
  kGarbageInStream,  // not JSON
  // Decode, push: blocks are reserved, and prefill, which has been asked, still computes.
  kCutWhileWaiting,
  kErrorWhileWaiting,
  kHangWhileWaiting,
  kGarbageWhileWaiting,
  // Prefill, push: decode has all blocks and the first token.
  kCutAfterHandover,
  kHangAfterHandover,
};

// How a leg looks from the worker.
enum class LegEnd : uint8_t { kOpen, kCompleted, kClosed };  // kClosed: by the router, which means cancelled

inline TokenId mock_token(const std::vector<TokenId>& prompt, size_t index) {
  int64_t sum = static_cast<int64_t>(index);
  for (const TokenId token : prompt) sum += token;
  return static_cast<TokenId>(sum % 1000);
}

// Requests waiting at decode mocks for their KV blocks; shared by the mocks of one test. The function takes the blocks;
// false: prefill is not done yet.
struct MockKv {
  std::map<std::string, std::function<bool()>> arrivals;
  // Handles of publications that decode has not fetched and nobody has released.
  std::set<std::string> unread;
  int num_released = 0;
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
                          if (is_frozen()) return held_.push_back(std::move(exchange));
                          if (!healthy)
                            return exchange->respond({503, {}, "application/json", R"({"status":"loading"})"});
                          exchange->respond({200, {}, "application/json", R"({"status":"ok"})"});
                        }});
    server_->add_route({"POST", "/v1/completions", false,
                        [this](std::shared_ptr<api::HttpExchange> exchange) { answer(std::move(exchange)); }});
    server_->add_route({"POST", api::kReleasePath, false, [this](std::shared_ptr<api::HttpExchange> exchange) {
                          const nlohmann::json body = nlohmann::json::parse(exchange->request().body);
                          const nlohmann::json& named = body["kv_transfer_params"];
                          CHECK_EQ(named["remote_engine_id"].get<std::string>(), "mock:1");
                          kv_->unread.erase(named["remote_request_id"].get<std::string>());
                          ++kv_->num_released;
                          exchange->respond({202, {}, "application/json", "{}"});
                        }});
    port_ = server_->port();
    server_->start();
  }
  // As if the process was killed: every connection breaks, further ones are refused.
  void kill() { server_.reset(); }
  void revive() { listen(port_); }
  // Sets `fault`; those of the whole server take effect at once.
  void fail_with(MockFault new_fault) {
    fault = new_fault;
    if (fault == MockFault::kRefuse || fault == MockFault::kGarbage) kill();
    if (fault == MockFault::kGarbage) garbage_ = std::make_unique<GarbageServer>(io_, port_);
  }

  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }

  MockFault fault = MockFault::kNone;
  bool healthy = true;
  std::function<void()> on_answered;  // prefill's answer is on its way
  std::chrono::milliseconds token_gap{0};
  int num_requests = 0;  // that reached this worker
  int num_open = 0;      // legs that have neither ended nor been closed by the router
  std::vector<nlohmann::json> bodies;
  std::vector<api::HttpHeaders> headers;
  std::vector<std::shared_ptr<const LegEnd>> legs;  // in the order of their requests

 private:
  struct Stream {
    std::shared_ptr<api::HttpExchange> exchange;
    std::vector<TokenId> prompt;
    size_t max_tokens = 0;
    size_t sent = 0;
    std::unique_ptr<boost::asio::steady_timer> timer{};
    std::shared_ptr<LegEnd> end = std::make_shared<LegEnd>(LegEnd::kOpen);
  };

  // Sends bytes that are not HTTP to whoever connects.
  struct GarbageServer {
    GarbageServer(boost::asio::io_context& io, uint16_t port)
        : acceptor(io, {boost::asio::ip::make_address("127.0.0.1"), port}) {
      accept();
    }
    void accept() {
      acceptor.async_accept([this](const boost::system::error_code& error, boost::asio::ip::tcp::socket socket) {
        if (error) return;
        socket.write_some(boost::asio::buffer(std::string("\x00\xff{]\r\nnot HTTP\r\n\r\n", 18)));
        sockets.push_back(std::move(socket));
        accept();
      });
    }
    boost::asio::ip::tcp::acceptor acceptor;
    std::vector<boost::asio::ip::tcp::socket> sockets;
  };

  bool is_frozen() const { return fault == MockFault::kFreeze || fault == MockFault::kFreezeInStream; }

  void answer(std::shared_ptr<api::HttpExchange> exchange) {
    ++num_requests;
    bodies.push_back(nlohmann::json::parse(exchange->request().body));
    headers.push_back(exchange->request().headers);
    const nlohmann::json& body = bodies.back();
    const auto stream = std::make_shared<Stream>();
    legs.push_back(stream->end);
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
        held_.push_back(exchange);  // dropping it would be an answer
        return cut_connections();
      default:
        break;
    }
    stream->exchange = exchange;
    stream->prompt = body["prompt"].get<std::vector<TokenId>>();
    stream->max_tokens = body["max_tokens"].get<size_t>();
    stream->sent = body.value("resume_token_ids", nlohmann::json::array()).size();
    ++num_open;
    exchange->on_disconnect([this, stream] { close(*stream, LegEnd::kClosed); });
    if (fault == MockFault::kHang || fault == MockFault::kFreeze) return hanging_.push_back(stream);
    body["stream"].get<bool>() ? start_decode(stream, body) : finish_prefill(stream, body);
  }

  void respond_error(api::HttpExchange& exchange, ErrorKind kind) {
    exchange.respond(api::error_response(make_error(kind, "the mock fails")));
  }
  static std::string error_object() { return api::error_body(make_error(ErrorKind::kInternal, "the mock fails"), 500); }
  void cut_connections() {
    boost::asio::post(io_, [this] { kill(), revive(), held_.clear(); });
  }

  void close(Stream& stream, LegEnd end) {
    if (*stream.end != LegEnd::kOpen) return;
    *stream.end = end;
    --num_open;
    if (stream.timer) stream.timer->cancel();
  }

  void finish_prefill(const std::shared_ptr<Stream>& stream, const nlohmann::json& body) {
    const nlohmann::json params = body.value("kv_transfer_params", nlohmann::json::object());
    nlohmann::json response = {{"choices", {{{"text", ""}, {"finish_reason", "length"}}}}};
    if (fails_in_answer(stream)) return;
    if (params.value("remote_request_id", nlohmann::json()).is_string()) {  // push: hand the blocks to decode
      const auto arrival = kv_->arrivals.extract(params["remote_request_id"].get<std::string>());
      if (!arrival.empty() && !arrival.mapped()()) return hanging_.push_back(stream);
    } else if (params.value("do_remote_decode", false) && fault != MockFault::kNoParams) {  // pull: publish
      const std::string handle = "pull-" + std::to_string(kv_->next_handle++);
      kv_->unread.insert(handle);
      response["kv_transfer_params"] = {
          {"do_remote_prefill", true}, {"remote_engine_id", "mock:1"}, {"remote_request_id", handle}, {"vendor", {7}}};
    }
    if (fault == MockFault::kHangAfterHandover) return hanging_.push_back(stream);
    if (fault == MockFault::kCutAfterHandover) {
      stream->timer = std::make_unique<boost::asio::steady_timer>(io_, std::chrono::milliseconds(50));
      return stream->timer->async_wait([this, stream](const boost::system::error_code&) { cut_connections(); });
    }
    close(*stream, LegEnd::kCompleted);
    stream->exchange->respond({200, {}, "application/json", response.dump()});
    if (on_answered) on_answered();
  }

  // Prefill's faults after the head of its answer.
  bool fails_in_answer(const std::shared_ptr<Stream>& stream) {
    if (fault == MockFault::kErrorInStream || fault == MockFault::kGarbageInStream) {
      close(*stream, LegEnd::kCompleted);
      const std::string text = fault == MockFault::kErrorInStream ? error_object() : "<html>";
      stream->exchange->respond({200, {}, "application/json", text});
      return true;
    }
    if (fault != MockFault::kCutInStream && fault != MockFault::kHangInStream && fault != MockFault::kFreezeInStream) {
      return false;
    }
    stream->exchange->start_stream({200, {}, "application/json", ""});
    stream->exchange->write("{\"choices\":[");
    if (fault == MockFault::kCutInStream) {
      cut_connections();
    } else {
      hanging_.push_back(stream);
    }
    return true;
  }

  void start_decode(const std::shared_ptr<Stream>& stream, const nlohmann::json& body) {
    stream->exchange->start_stream({200, {}, "text/event-stream", ""});
    const nlohmann::json params = body.value("kv_transfer_params", nlohmann::json::object());
    if (params.value("transfer_mode", "") != "push" || fault == MockFault::kEarly) {
      kv_->unread.erase(params.value("remote_request_id", ""));
      return send_token(stream);
    }
    const std::string handle = "push-" + std::to_string(kv_->next_handle++);
    kv_->arrivals[handle] = [this, stream] {
      if (fails_while_waiting(stream)) return false;
      send_token(stream);
      return true;
    };
    const nlohmann::json address = {{"do_remote_decode", true}, {"remote_request_id", handle}, {"remote_port", 1}};
    write(*stream, {{"choices", nlohmann::json::array()}, {"kv_transfer_params", address}});
  }

  bool fails_while_waiting(const std::shared_ptr<Stream>& stream) {
    switch (fault) {
      case MockFault::kCutWhileWaiting:
        cut_connections();
        return true;
      case MockFault::kErrorWhileWaiting:
        write_text(*stream, error_object());
        return true;
      case MockFault::kGarbageWhileWaiting:
        write_text(*stream, "<html>");
        return true;
      case MockFault::kHangWhileWaiting:
        return true;
      default:
        return false;
    }
  }

  // Decode's faults after the first token.
  bool fails_in_stream(const std::shared_ptr<Stream>& stream) {
    switch (fault) {
      case MockFault::kCutInStream:
        cut_connections();
        return true;
      case MockFault::kErrorInStream:
      case MockFault::kGarbageInStream:
        write_text(*stream, fault == MockFault::kErrorInStream ? error_object() : "<html>");
        close(*stream, LegEnd::kCompleted);
        stream->exchange->finish();
        return true;
      case MockFault::kHangInStream:
      case MockFault::kFreezeInStream:
        hanging_.push_back(stream);
        return true;
      default:
        return false;
    }
  }

  void send_token(const std::shared_ptr<Stream>& stream) {
    if (*stream->end != LegEnd::kOpen) return;
    if (stream->sent == 1 && fails_in_stream(stream)) return;
    const bool last = stream->sent + 1 == stream->max_tokens;
    nlohmann::json choice = {{"index", 0}, {"text", ""}, {"token_ids", {mock_token(stream->prompt, stream->sent++)}}};
    choice["finish_reason"] = last ? nlohmann::json("length") : nlohmann::json();
    write(*stream, {{"choices", {choice}}, {"usage", {{"prompt_tokens", stream->prompt.size()}}}});
    if (last) {
      write_text(*stream, "[DONE]");
      close(*stream, LegEnd::kCompleted);
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
  std::unique_ptr<GarbageServer> garbage_;
  uint16_t port_ = 0;
  std::vector<std::shared_ptr<Stream>> hanging_;
  std::vector<std::shared_ptr<api::HttpExchange>> held_;  // never answered
};

}  // namespace tandem::router
