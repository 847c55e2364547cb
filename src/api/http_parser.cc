#include "src/api/http_parser.h"

#include <algorithm>
#include <boost/beast/http/basic_parser.hpp>
#include <boost/beast/http/error.hpp>

namespace tandem::api {
namespace {

namespace http = boost::beast::http;
using boost::beast::error_code;
using BoostView = boost::beast::string_view;

std::string_view to_std(BoostView text) { return {text.data(), text.size()}; }

// Takes what the base class calls out and keeps it.
template <bool kIsRequest>
class Collector final : public http::basic_parser<kIsRequest> {
 public:
  HttpHead head;
  HttpParser::BodySink sink;

 private:
  void on_request_impl(http::verb, BoostView method, BoostView target, int version, error_code&) override {
    head.method = to_std(method);
    head.target = to_std(target);
    head.version = version;
  }
  void on_response_impl(int status, BoostView, int version, error_code&) override {
    head.status = status;
    head.version = version;
  }
  void on_field_impl(http::field, BoostView name, BoostView value, error_code&) override {
    // Fields of a chunked body's trailer come here too and are dropped.
    if (!in_body_) head.headers.emplace_back(to_std(name), to_std(value));
  }
  void on_header_impl(error_code&) override { in_body_ = true; }
  void on_body_init_impl(const boost::optional<std::uint64_t>&, error_code&) override {}
  std::size_t on_body_impl(BoostView body, error_code&) override { return take_body(body); }
  void on_chunk_header_impl(std::uint64_t, BoostView, error_code&) override {}
  std::size_t on_chunk_body_impl(std::uint64_t, BoostView body, error_code&) override { return take_body(body); }
  void on_finish_impl(error_code&) override {}

  std::size_t take_body(BoostView body) {
    if (sink) sink(to_std(body));
    return body.size();
  }

  bool in_body_ = false;
};

bool is_token_char(char c) {
  constexpr std::string_view kOthers = "!#$%&'*+-.^_`|~";
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         kOthers.find(c) != std::string_view::npos;
}

bool is_token(std::string_view text) { return !text.empty() && std::all_of(text.begin(), text.end(), is_token_char); }

Error bad_request(std::string_view message) {
  Error error = make_error(ErrorKind::kInvalidArgument, "{}", message);
  error.code = "bad_request";
  return error;
}

bool is_host(std::string_view host) {
  return !host.empty() && std::all_of(host.begin(), host.end(),
                                      [](char c) { return is_token_char(c) || c == ':' || c == '[' || c == ']'; });
}

}  // namespace

struct HttpParser::Impl {
  std::unique_ptr<Collector<true>> request;
  std::unique_ptr<Collector<false>> response;

  template <typename F>
  decltype(auto) visit(F&& f) {
    return request ? f(*request) : f(*response);
  }
};

HttpParser::HttpParser(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpParser::HttpParser(HttpParser&&) noexcept = default;
HttpParser& HttpParser::operator=(HttpParser&&) noexcept = default;
HttpParser::~HttpParser() = default;

HttpParser HttpParser::for_request(uint32_t max_head_bytes) {
  auto impl = std::make_unique<Impl>();
  impl->request = std::make_unique<Collector<true>>();
  impl->request->header_limit(max_head_bytes);
  impl->request->body_limit(boost::none);
  return HttpParser(std::move(impl));
}

HttpParser HttpParser::for_response(uint32_t max_head_bytes, bool expect_body) {
  auto impl = std::make_unique<Impl>();
  impl->response = std::make_unique<Collector<false>>();
  impl->response->header_limit(max_head_bytes);
  impl->response->body_limit(boost::none);
  impl->response->skip(!expect_body);
  return HttpParser(std::move(impl));
}

void HttpParser::set_body_sink(BodySink sink) {
  impl_->visit([&sink](auto& parser) { parser.sink = std::move(sink); });
}

void HttpParser::set_body_limit(uint64_t bytes) {
  impl_->visit([bytes](auto& parser) { parser.body_limit(bytes); });
}

Result<size_t> HttpParser::put(std::string_view bytes) {
  return impl_->visit([bytes](auto& parser) -> Result<size_t> {
    size_t used = 0;
    const bool had_head = parser.is_header_done();
    parser.eager(had_head);
    while (used < bytes.size() && !parser.is_done()) {
      error_code ec;
      const size_t n = parser.put(boost::asio::const_buffer(bytes.data() + used, bytes.size() - used), ec);
      used += n;
      if (ec == http::error::need_more || (!ec && n == 0)) break;
      if (ec == http::error::body_limit) return make_error(ErrorKind::kTooLarge, "the body is over its limit");
      if (ec) return bad_request("the HTTP message is malformed");
      if (!had_head && parser.is_header_done()) break;
    }
    if (!had_head && parser.is_header_done()) {
      parser.head.keep_alive = parser.keep_alive();
      parser.head.chunked = parser.chunked();
      if (const auto length = parser.content_length()) parser.head.content_length = *length;
    }
    return used;
  });
}

Status HttpParser::put_eof() {
  return impl_->visit([](auto& parser) -> Status {
    if (!parser.got_some()) return bad_request("the connection was closed before the message began");
    error_code ec;
    parser.put_eof(ec);
    if (ec || !parser.is_done()) return bad_request("the connection was closed inside the message");
    return {};
  });
}

bool HttpParser::head_done() const {
  return impl_->visit([](auto& parser) { return parser.is_header_done(); });
}
bool HttpParser::done() const {
  return impl_->visit([](auto& parser) { return parser.is_done(); });
}
const HttpHead& HttpParser::head() const {
  return impl_->visit([](auto& parser) -> const HttpHead& { return parser.head; });
}

Status check_request_head(std::string_view block, size_t max_headers, size_t max_uri_bytes) {
  size_t num_lines = 0;
  while (!block.empty()) {
    const size_t end = block.find("\r\n");
    if (end == std::string_view::npos) return bad_request("a header line does not end with CR LF");
    const std::string_view line = block.substr(0, end);
    block.remove_prefix(end + 2);
    for (const char c : line) {
      // Bare CR and LF, NUL and other controls; a tab is allowed in values.
      if ((static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f) {
        return bad_request("the request head has a control character");
      }
    }
    if (line.empty()) break;
    if (num_lines++ == 0) {
      const size_t space = line.find(' ');
      const size_t last_space = line.rfind(' ');
      if (!is_token(line.substr(0, space)) || last_space == space) return bad_request("the request line is malformed");
      if (last_space - space - 1 > max_uri_bytes) {
        Error error = make_error(ErrorKind::kInvalidArgument, "the request target has {} bytes, the limit is {}",
                                 last_space - space - 1, max_uri_bytes);
        error.code = "uri_too_long";
        return error;
      }
      continue;
    }
    if (line[0] == ' ' || line[0] == '\t') return bad_request("a folded header line");
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos || !is_token(line.substr(0, colon))) {
      return bad_request("a header name is malformed");
    }
  }
  if (num_lines > max_headers + 1) {
    Error error = make_error(ErrorKind::kInvalidArgument, "the request has {} headers, the limit is {}", num_lines - 1,
                             max_headers);
    error.code = "too_many_headers";
    return error;
  }
  return {};
}

Status check_request_fields(const HttpHead& head) {
  size_t num_hosts = 0, num_lengths = 0, num_codings = 0;
  for (const auto& [name, value] : head.headers) {
    if (equal_ignoring_case(name, "host")) {
      ++num_hosts;
      if (!is_host(value)) return bad_request("the Host header is malformed");
    } else if (equal_ignoring_case(name, "content-length")) {
      ++num_lengths;
      if (value.empty() || !std::all_of(value.begin(), value.end(), [](char c) { return c >= '0' && c <= '9'; })) {
        return bad_request("Content-Length is not a number");
      }
    } else if (equal_ignoring_case(name, "transfer-encoding")) {
      ++num_codings;
      if (head.version < 11) return bad_request("Transfer-Encoding in an HTTP/1.0 request");
      if (!equal_ignoring_case(value, "chunked")) {
        Error error = make_error(ErrorKind::kUnsupported, "the only supported Transfer-Encoding is chunked");
        error.code = "not_implemented";
        return error;
      }
    }
  }
  if (num_hosts > 1 || (num_hosts == 0 && head.version >= 11))
    return bad_request("exactly one Host header is required");
  if (num_lengths > 1) return bad_request("more than one Content-Length");
  if (num_codings > 1) return bad_request("more than one Transfer-Encoding");
  if (num_codings + num_lengths > 1) return bad_request("both Transfer-Encoding and Content-Length");
  return {};
}

}  // namespace tandem::api
