// For tests: an event loop on a thread of its own, and a raw blocking socket that can send anything.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <functional>
#include <future>
#include <map>
#include <string>
#include <string_view>
#include <thread>

#include "src/base/check.h"

namespace tandem::api {

class LoopThread {
 public:
  LoopThread() : work_(io.get_executor()), thread_([this] { io.run(); }) {}
  ~LoopThread() { stop(); }
  void stop() {
    work_.reset();
    io.stop();
    if (thread_.joinable()) thread_.join();
  }
  // Runs `work` on the loop and waits for it.
  template <typename F>
  auto run(F work) -> decltype(work()) {
    std::packaged_task<decltype(work())()> task(std::move(work));
    auto result = task.get_future();
    boost::asio::post(io, [&task] { task(); });
    return result.get();
  }

  boost::asio::io_context io{1};

 private:
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  std::thread thread_;
};

// Waits until `condition` holds; false after `limit`.
inline bool eventually(const std::function<bool()>& condition,
                       std::chrono::milliseconds limit = std::chrono::milliseconds(5'000)) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

struct RawResponse {
  int status = 0;                              // 0: the connection ended before a whole response
  std::map<std::string, std::string> headers;  // lower-case names
  std::string body;
};

class RawSocket {
 public:
  explicit RawSocket(uint16_t port, int receive_buffer_bytes = 0) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer_bytes > 0) {
      ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof receive_buffer_bytes);
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK_EQ(::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  ~RawSocket() { close(); }
  RawSocket(const RawSocket&) = delete;
  RawSocket& operator=(const RawSocket&) = delete;

  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  void shutdown_send() { ::shutdown(fd_, SHUT_WR); }
  // Closes with a reset instead of an orderly end.
  void reset() {
    const linger now{1, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close();
  }

  // False if the peer has closed.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  // Appends what arrives within `limit` to `buffered`; false at the end of the stream or after `limit`.
  bool receive(std::chrono::milliseconds limit = std::chrono::milliseconds(10'000)) {
    pollfd poll_fd{fd_, POLLIN, 0};
    if (::poll(&poll_fd, 1, static_cast<int>(limit.count())) <= 0) return false;
    char chunk[16384];
    const ssize_t n = ::recv(fd_, chunk, sizeof chunk, 0);
    if (n <= 0) return false;
    buffered.append(chunk, static_cast<size_t>(n));
    return true;
  }
  bool receive_until(std::string_view text) {
    while (buffered.find(text) == std::string::npos) {
      if (!receive()) return false;
    }
    return true;
  }
  // True once the peer has closed; what it sent before stays in `buffered`.
  bool is_closed_within(std::chrono::milliseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (true) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
      if (left.count() <= 0) return false;
      pollfd poll_fd{fd_, POLLIN, 0};
      if (::poll(&poll_fd, 1, static_cast<int>(left.count())) <= 0) return false;
      char chunk[16384];
      const ssize_t n = ::recv(fd_, chunk, sizeof chunk, 0);
      if (n <= 0) return true;
      buffered.append(chunk, static_cast<size_t>(n));
    }
  }

  RawResponse read_response(bool has_body = true) {
    RawResponse response;
    if (!receive_until("\r\n\r\n")) return response;
    const size_t head_end = buffered.find("\r\n\r\n");
    std::string head = buffered.substr(0, head_end + 2);
    buffered.erase(0, head_end + 4);
    size_t line_begin = head.find("\r\n") + 2;
    while (line_begin < head.size()) {
      const size_t line_end = head.find("\r\n", line_begin);
      const std::string line = head.substr(line_begin, line_end - line_begin);
      line_begin = line_end + 2;
      const size_t colon = line.find(": ");
      std::string name = line.substr(0, colon);
      for (char& c : name) c = static_cast<char>(std::tolower(c));
      response.headers[name] = line.substr(colon + 2);
    }
    if (!has_body) {
    } else if (response.headers.contains("content-length")) {
      const size_t length = std::stoul(response.headers["content-length"]);
      while (buffered.size() < length) {
        if (!receive()) return {};
      }
      response.body = buffered.substr(0, length);
      buffered.erase(0, length);
    } else if (response.headers["transfer-encoding"] == "chunked") {
      while (true) {
        if (!receive_until("\r\n")) return {};
        const size_t line_end = buffered.find("\r\n");
        const size_t length = std::stoul(buffered.substr(0, line_end), nullptr, 16);
        while (buffered.size() < line_end + 2 + length + 2) {
          if (!receive()) return {};
        }
        response.body += buffered.substr(line_end + 2, length);
        buffered.erase(0, line_end + 2 + length + 2);
        if (length == 0) break;
      }
    }
    response.status = std::stoi(head.substr(9, 3));
    return response;
  }

  // Sends a whole request and reads its response.
  RawResponse exchange(std::string_view request) {
    send(request);
    return read_response();
  }

  std::string buffered;

 private:
  int fd_;
};

inline std::string post_text(std::string_view path, std::string_view body, std::string_view headers = "") {
  return fmt::format("POST {} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{}\r\n{}",
                     path, body.size(), headers, body);
}
inline std::string get_text(std::string_view path, std::string_view headers = "") {
  return fmt::format("GET {} HTTP/1.1\r\nHost: h\r\n{}\r\n", path, headers);
}

}  // namespace tandem::api
