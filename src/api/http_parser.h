// Strict HTTP/1.1 message parsing on top of Beast's parser, which stays inside http_parser.cc to keep compile times
// down. Bytes in any split; the body leaves through a callback.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "src/api/http_types.h"
#include "src/base/result.h"

namespace tandem::api {

struct HttpHead {
  std::string method;  // requests
  std::string target;  // requests
  int status = 0;      // responses
  int version = 11;    // 10 or 11
  HttpHeaders headers;
  bool keep_alive = false;
  bool chunked = false;
  std::optional<uint64_t> content_length;
};

class HttpParser {
 public:
  using BodySink = std::function<void(std::string_view)>;

  static HttpParser for_request(uint32_t max_head_bytes);
  // `expect_body` is false for the response to HEAD.
  static HttpParser for_response(uint32_t max_head_bytes, bool expect_body);
  HttpParser(HttpParser&&) noexcept;
  HttpParser& operator=(HttpParser&&) noexcept;
  ~HttpParser();

  void set_body_sink(BodySink sink);
  // Bytes of body that are let through; more is kTooLarge. Set before the first body byte; default: no limit.
  void set_body_limit(uint64_t bytes);

  // Returns how many bytes were used: all of the head but no body byte in the call that completes the head, then as
  // many as possible. Zero: more input is needed before anything can be used.
  Result<size_t> put(std::string_view bytes);
  // The peer has closed. An error if the message is not complete.
  Status put_eof();

  bool head_done() const;
  bool done() const;
  const HttpHead& head() const;

 private:
  struct Impl;
  explicit HttpParser(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What Beast lets pass in a request's head and we do not. `block` ends with the empty line.
// Errors: kInvalidArgument with code "bad_request"; "too_many_headers"; "uri_too_long".
Status check_request_head(std::string_view block, size_t max_headers, size_t max_uri_bytes);
// The same for the parsed head: Host, Transfer-Encoding, Content-Length. Code "not_implemented" for an unknown coding.
Status check_request_fields(const HttpHead& head);

}  // namespace tandem::api
