#include "src/bench/mock_fleet.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <charconv>
#include <unordered_map>

#include "src/api/openai_response.h"
#include "src/api/socket_options.h"
#include "src/base/check.h"

namespace tandem::bench {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

namespace {

constexpr size_t kReadBytes = 16UL << 10;
constexpr size_t kMaxRequestBytes = 64UL << 20;
constexpr std::string_view kStreamHead =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    "Cache-Control: no-cache\r\n\r\n";

std::string as_http_chunk(std::string_view bytes) { return fmt::format("{:x}\r\n{}\r\n", bytes.size(), bytes); }

std::string as_response(int status, std::string_view body) {
  return fmt::format("HTTP/1.1 {} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}", status,
                     status == 200 ? "OK" : "Not Found", body.size(), body);
}

// One answer as a worker streams it to a router: token ids, no text, counts in every chunk.
std::vector<std::string> render_answer(const std::vector<TokenId>& tokens) {
  api::OpenAiRequest request;
  request.model = "mock";
  request.return_token_ids = request.return_tokens_as_token_ids = true;
  request.detokenize = false;
  const api::ResponseWriter writer(request, "cmpl-0123456789abcdef0123456789abcdef", 1'700'000'000,
                                   [](TokenId) { return std::string_view(); });
  std::vector<std::string> pieces;
  api::UsageCounts usage{.prompt_tokens = 1};
  int64_t text_offset = 0;
  for (const TokenId token : tokens) {
    const engine::GeneratedToken generated{.token = token, .logprob = 0, .top_logprobs = {}};
    api::ChoicePart part;
    part.tokens = {&generated, 1};
    if (++usage.completion_tokens == std::ssize(tokens)) part.finish = engine::FinishReason::kLength;
    pieces.push_back(as_http_chunk(writer.chunk(part, text_offset, usage, "")));
  }
  pieces.back() += as_http_chunk(writer.bare_chunk(usage, "") + std::string(api::kSseDone)) + "0\r\n\r\n";
  return pieces;
}

std::string_view text_after(std::string_view body, std::string_view key) {
  const size_t at = body.find(key);
  return at == std::string_view::npos ? std::string_view() : body.substr(at + key.size());
}

}  // namespace

int64_t answer_of_body(std::string_view body, size_t num_answers) {
  std::string_view ids = text_after(body, "\"prompt\":[");
  uint64_t sum = 0;
  while (!ids.empty()) {
    uint64_t id = 0;
    const auto [end, ec] = std::from_chars(ids.data(), ids.data() + ids.size(), id);
    if (ec != std::errc()) return -1;
    sum += id;
    ids.remove_prefix(static_cast<size_t>(end - ids.data()));
    if (ids.empty() || ids.front() == ']') return ids.empty() ? -1 : static_cast<int64_t>(sum % num_answers);
    ids.remove_prefix(1);
  }
  return -1;
}

namespace {
class Connection;
}

struct MockFleet::Impl : std::enable_shared_from_this<MockFleet::Impl> {
  Impl(asio::io_context& context, MockFleetOptions fleet_options) : io(context), options(std::move(fleet_options)) {}

  asio::io_context& io;
  MockFleetOptions options;
  std::vector<tcp::acceptor> prefill;
  std::vector<tcp::acceptor> decode;
  std::vector<std::vector<std::string>> answers;  // pieces: one per token, framed
  std::vector<std::string> whole_answers;         // all pieces with the head
  std::unordered_map<uint64_t, std::pair<std::weak_ptr<Connection>, size_t>> reservations;  // by handle: its answer
  uint64_t next_handle = 1;

  Status listen(std::vector<tcp::acceptor>& acceptors, int count);
  void accept(tcp::acceptor& acceptor, bool is_prefill);
};

namespace {

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<MockFleet::Impl> fleet, tcp::socket socket, bool is_prefill)
      : fleet_(std::move(fleet)), socket_(std::move(socket)), timer_(fleet_->io), is_prefill_(is_prefill) {}

  void read() {
    const size_t old_size = input_.size();
    input_.resize(old_size + kReadBytes);
    socket_.async_read_some(asio::buffer(input_.data() + old_size, kReadBytes),
                            [self = shared_from_this(), old_size](error_code ec, size_t n) {
                              self->input_.resize(old_size + n);
                              if (ec || self->input_.size() > kMaxRequestBytes) return;
                              while (self->take_request()) {
                              }
                              self->read();
                            });
  }

  void start_answer(size_t answer) {
    if (fleet_->options.token_gap.count() == 0) return write(fleet_->whole_answers[answer]);
    next_token_us_ = std::chrono::steady_clock::now();
    write(std::string(kStreamHead));
    send_token(answer, 0);
  }

 private:
  bool take_request() {
    const size_t head_end = input_.find("\r\n\r\n");
    if (head_end == std::string::npos) return false;
    const std::string_view head = std::string_view(input_).substr(0, head_end);
    size_t length = 0;
    if (const std::string_view digits = text_after(head, "Content-Length: "); !digits.empty()) {
      std::from_chars(digits.data(), digits.data() + digits.size(), length);
    }
    if (input_.size() < head_end + 4 + length) return false;
    answer(head, std::string_view(input_).substr(head_end + 4, length));
    input_.erase(0, head_end + 4 + length);
    return true;
  }

  void answer(std::string_view head, std::string_view body) {
    if (head.starts_with("GET /health ")) return write(as_response(200, R"({"status":"ok"})"));
    const int64_t answer =
        head.starts_with("POST /v1/completions ") ? answer_of_body(body, fleet_->answers.size()) : -1;
    if (answer < 0) return write(as_response(404, R"({"error":{"message":"a mock knows no such request"}})"));
    if (is_prefill_) return finish_prefill(body);
    if (text_after(body, "\"transfer_mode\":\"push\"").empty()) return start_answer(static_cast<size_t>(answer));
    const uint64_t handle = fleet_->next_handle++;
    fleet_->reservations[handle] = {weak_from_this(), static_cast<size_t>(answer)};
    std::string out(kStreamHead);
    out += as_http_chunk(
        fmt::format("data: {{\"id\":\"cmpl-0\",\"object\":\"text_completion\",\"choices\":[],\"kv_transfer_params\":"
                    "{{\"do_remote_decode\":true,\"remote_host\":\"127.0.0.1\",\"remote_port\":1,\"remote_request_id\":"
                    "\"{}\"}}}}\n\n",
                    handle));
    write(std::move(out));
    has_head_ = true;
  }

  void finish_prefill(std::string_view body) {
    const std::string_view digits = text_after(body, "\"remote_request_id\":\"");
    uint64_t handle = 0;
    std::from_chars(digits.data(), digits.data() + digits.size(), handle);
    if (const auto reserved = fleet_->reservations.extract(handle)) {
      if (const auto decode = reserved.mapped().first.lock()) decode->start_answer(reserved.mapped().second);
    }
    write(as_response(200, R"({"id":"cmpl-0","object":"text_completion","created":1700000000,"model":"mock",)"
                           R"("choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}],)"
                           R"("usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}})"));
  }

  void send_token(size_t answer, size_t index) {
    write(fleet_->answers[answer][index]);
    if (index + 1 == fleet_->answers[answer].size()) return;
    next_token_us_ += fleet_->options.token_gap;
    timer_.expires_at(next_token_us_);
    timer_.async_wait([self = shared_from_this(), answer, index](error_code ec) {
      if (!ec) self->send_token(answer, index + 1);
    });
  }

  void write(std::string bytes) {
    if (has_head_ && bytes.starts_with(kStreamHead)) {
      bytes.erase(0, kStreamHead.size());
      has_head_ = false;
    }
    output_ += bytes;
    if (!output_.empty() && writing_.empty()) flush();
  }

  void flush() {
    writing_.swap(output_);
    asio::async_write(socket_, asio::buffer(writing_), [self = shared_from_this()](error_code ec, size_t) {
      self->writing_.clear();
      if (!ec && !self->output_.empty()) self->flush();
    });
  }

  const std::shared_ptr<MockFleet::Impl> fleet_;
  tcp::socket socket_;
  asio::steady_timer timer_;
  const bool is_prefill_;
  bool has_head_ = false;  // the head of the present stream left with its reservation
  std::chrono::steady_clock::time_point next_token_us_;
  std::string input_;
  std::string output_;
  std::string writing_;
};

}  // namespace

Status MockFleet::Impl::listen(std::vector<tcp::acceptor>& acceptors, int count) {
  acceptors.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    tcp::acceptor& acceptor = acceptors.emplace_back(io);
    error_code ec;
    acceptor.open(tcp::v4(), ec);
    if (!ec) acceptor.bind(tcp::endpoint(asio::ip::address_v4::loopback(), 0), ec);
    if (!ec) acceptor.listen(asio::socket_base::max_listen_connections, ec);
    if (ec) return make_error(ErrorKind::kUnavailable, "a mock worker cannot listen on loopback: {}", ec.message());
    accept(acceptor, &acceptors == &prefill);
  }
  return {};
}

void MockFleet::Impl::accept(tcp::acceptor& acceptor, bool is_prefill) {
  acceptor.async_accept([self = shared_from_this(), &acceptor, is_prefill](error_code ec, tcp::socket socket) {
    if (ec) return;
    api::tune_tcp_socket(socket.native_handle());
    std::make_shared<Connection>(self, std::move(socket), is_prefill)->read();
    self->accept(acceptor, is_prefill);
  });
}

MockFleet::MockFleet(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<MockFleet>> MockFleet::listen(asio::io_context& io, MockFleetOptions options) {
  CHECK(!options.answers.empty());
  auto impl = std::make_shared<Impl>(io, std::move(options));
  for (const std::vector<TokenId>& tokens : impl->options.answers) {
    CHECK(!tokens.empty());
    impl->answers.push_back(render_answer(tokens));
    std::string& whole = impl->whole_answers.emplace_back(kStreamHead);
    for (const std::string& piece : impl->answers.back()) whole += piece;
  }
  TANDEM_TRY(impl->listen(impl->prefill, impl->options.num_prefill));
  TANDEM_TRY(impl->listen(impl->decode, impl->options.num_decode));
  return std::unique_ptr<MockFleet>(new MockFleet(std::move(impl)));
}

// Connections live on until their peers close them or `io` is destroyed.
MockFleet::~MockFleet() {
  error_code ignored;
  for (tcp::acceptor& acceptor : impl_->prefill) acceptor.close(ignored);
  for (tcp::acceptor& acceptor : impl_->decode) acceptor.close(ignored);
}

namespace {
std::vector<uint16_t> ports_of(const std::vector<tcp::acceptor>& acceptors) {
  std::vector<uint16_t> ports;
  error_code ignored;
  for (const tcp::acceptor& acceptor : acceptors) ports.push_back(acceptor.local_endpoint(ignored).port());
  return ports;
}
}  // namespace

std::vector<uint16_t> MockFleet::prefill_ports() const { return ports_of(impl_->prefill); }
std::vector<uint16_t> MockFleet::decode_ports() const { return ports_of(impl_->decode); }

}  // namespace tandem::bench
