#include "src/bench/stream_load.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <deque>
#include <memory>
#include <random>

#include "src/api/socket_options.h"
#include "src/base/check.h"

namespace tandem::bench {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using SteadyTime = std::chrono::steady_clock::time_point;

namespace {

constexpr size_t kReadBytes = 64UL << 10;
constexpr std::string_view kEnd = "\r\n0\r\n\r\n";  // of a chunked body
constexpr int64_t kMaxFaults = 100;                 // then the load ends

SteadyTime now() { return std::chrono::steady_clock::now(); }
double seconds_between(SteadyTime begin, SteadyTime end) { return std::chrono::duration<double>(end - begin).count(); }
SteadyTime::duration as_duration(double seconds) {
  return std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(seconds));
}

class Load;

// One connection; it has at most one request under way.
class Lane {
 public:
  Lane(Load& load, asio::io_context& io) : load_(load), socket_(io), scratch_(kReadBytes, '\0') {}
  void send(size_t index, SteadyTime due);
  void close() {
    error_code ignored;
    socket_.close(ignored);
  }

 private:
  void transmit();
  void read();
  bool try_again();
  void end(const std::string& fault);

  Load& load_;
  tcp::socket socket_;
  std::string scratch_;
  std::string answer_;
  size_t index_ = 0;
  bool is_kept_ = false;  // the connection had a request before this one
  SteadyTime due_;
  SteadyTime first_token_;
};

class Load {
 public:
  Load(asio::io_context& context, const std::vector<StreamRequest>& all, const StreamLoadOptions& load_options)
      : requests(all),
        options(load_options),
        io(context),
        arrival_timer_(io),
        second_timer_(io),
        random_(load_options.seed) {}

  StreamLoadResult run() {
    begin_ = now();
    stop_ = begin_ + as_duration(options.seconds);
    io.restart();
    tick();
    if (options.rate > 0) {
      due_ = begin_;
      schedule();
    } else {
      for (int64_t i = 0; i < options.connections; ++i) make_lane().send(next_index(), now());
    }
    io.run_until(stop_);
    // In pieces, so that a time during which this whole process stood still counts as one piece.
    for (int i = 0; i < kDrainSeconds && !io.stopped(); ++i) io.run_for(std::chrono::seconds(1));
    end_operations();
    result.failed += in_flight + std::ssize(waiting_);
    if (result.first_fault.empty() && in_flight > 0) result.first_fault = "an answer did not end";
    result.seconds = seconds_between(begin_, std::max(last_end, stop_));
    return std::move(result);
  }

  // A lane is free again.
  void take_back(Lane& lane) {
    if (result.failed >= kMaxFaults) return io.stop();
    if (options.rate == 0) {
      if (now() < stop_) lane.send(next_index(), now());
    } else if (!waiting_.empty()) {
      const SteadyTime due = waiting_.front();
      waiting_.pop_front();
      lane.send(next_index(), due);
    } else {
      idle_.push_back(&lane);
    }
    finish_if_done();
  }

  const std::vector<StreamRequest>& requests;
  const StreamLoadOptions& options;
  asio::io_context& io;
  StreamLoadResult result;
  int64_t in_flight = 0;
  SteadyTime last_end;

  // Wraps a handler: it is counted while it waits, and does nothing once the load has ended.
  template <typename F>
  auto handler(F f) {
    ++num_pending_;
    return [this, f](auto... arguments) {
      --num_pending_;
      if (!has_ended_) f(arguments...);
    };
  }

 private:
  size_t next_index() { return static_cast<size_t>(num_sent_++) % requests.size(); }
  Lane& make_lane() { return *lanes_.emplace_back(std::make_unique<Lane>(*this, io)); }

  void schedule() {
    due_ += as_duration(std::exponential_distribution<double>(options.rate)(random_));
    if (due_ >= stop_) {
      arrivals_ended_ = true;
      return finish_if_done();
    }
    arrival_timer_.expires_at(due_);
    arrival_timer_.async_wait(handler([this](error_code ec) {
      if (ec) return;
      arrive();
      schedule();
    }));
  }

  void arrive() {
    if (!idle_.empty()) {
      Lane& lane = *idle_.back();  // the last used: a kept connection is the usual case
      idle_.pop_back();
      lane.send(next_index(), due_);
    } else if (std::ssize(lanes_) < options.connections) {
      make_lane().send(next_index(), due_);
    } else {
      waiting_.push_back(due_);
    }
  }

  // Handlers hold pointers into this, so the last one must have run.
  void end_operations() {
    has_ended_ = true;
    for (const auto& lane : lanes_) lane->close();
    arrival_timer_.cancel();
    second_timer_.cancel();
    io.restart();
    while (num_pending_ > 0) io.run_one();
  }

  void tick() {
    second_timer_.expires_after(std::chrono::seconds(1));
    second_timer_.async_wait(handler([this](error_code ec) {
      if (ec) return;
      if (options.on_second) options.on_second();
      tick();
    }));
  }

  void finish_if_done() {
    const bool sends_more = options.rate > 0 ? !arrivals_ended_ : now() < stop_;
    if (!sends_more && in_flight == 0 && waiting_.empty()) io.stop();
  }

  asio::steady_timer arrival_timer_;
  asio::steady_timer second_timer_;
  std::mt19937_64 random_;
  SteadyTime begin_;
  SteadyTime stop_;
  SteadyTime due_;
  bool arrivals_ended_ = false;
  bool has_ended_ = false;
  int64_t num_pending_ = 0;
  int64_t num_sent_ = 0;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<Lane*> idle_;
  std::deque<SteadyTime> waiting_;
};

void Lane::send(size_t index, SteadyTime due) {
  index_ = index;
  due_ = due;
  first_token_ = {};
  answer_.clear();
  ++load_.in_flight;
  transmit();
}

void Lane::transmit() {
  error_code ec;
  is_kept_ = socket_.is_open();
  if (!is_kept_) {
    // Blocking, but on loopback a connection is there at once, whether accepted yet or not.
    socket_.connect(tcp::endpoint(asio::ip::address_v4::loopback(), load_.options.port), ec);
    if (ec) return end("connecting failed: " + ec.message());
    api::tune_tcp_socket(socket_.native_handle());
  }
  asio::async_write(socket_, asio::buffer(load_.requests[index_].bytes),
                    load_.handler([this](error_code write_ec, size_t) {
                      if (!write_ec) return read();
                      if (!try_again()) end("sending failed: " + write_ec.message());
                    }));
}

void Lane::read() {
  socket_.async_read_some(asio::buffer(scratch_), load_.handler([this](error_code ec, size_t n) {
    if (ec && try_again()) return;
    if (ec) return end("the connection ended inside an answer: " + ec.message());
    answer_.append(scratch_.data(), n);
    if (first_token_ == SteadyTime() && answer_.find(load_.options.key) != std::string::npos) first_token_ = now();
    const bool is_stream = answer_.starts_with("HTTP/1.1 200");
    if (is_stream && !answer_.ends_with(kEnd)) return read();
    end(fault_of_answer(answer_, load_.requests[index_], load_.options));
  }));
}

// A server may close a kept connection at any time; what was sent on it then was not read.
bool Lane::try_again() {
  if (!is_kept_ || !answer_.empty()) return false;
  close();
  transmit();
  return true;
}

void Lane::end(const std::string& fault) {
  const SteadyTime end_time = now();
  --load_.in_flight;
  load_.last_end = end_time;
  if (fault.empty()) {
    ++load_.result.completed;
    load_.result.first_token_s.push_back(seconds_between(due_, first_token_));
    load_.result.whole_s.push_back(seconds_between(due_, end_time));
  } else {
    ++load_.result.failed;
    if (load_.result.first_fault.empty()) load_.result.first_fault = fault;
    close();
  }
  load_.take_back(*this);
}

}  // namespace

std::string fault_of_answer(std::string_view answer, const StreamRequest& request, const StreamLoadOptions& options) {
  if (!answer.starts_with("HTTP/1.1 200 ") || !answer.ends_with(kEnd)) {
    return fmt::format("not a whole stream: {}", answer.substr(0, 400));
  }
  std::string_view expected = request.expected;
  size_t at = 0;
  while ((at = answer.find(options.key, at)) != std::string_view::npos) {
    at += options.key.size();
    const std::string_view piece = answer.substr(at, answer.find(options.close, at) - at);
    if (!expected.starts_with(piece)) return fmt::format("another answer's text: {}", answer.substr(0, 4000));
    expected.remove_prefix(piece.size());
  }
  if (!expected.empty()) return fmt::format("the answer lacks {} bytes of text", expected.size());
  if (answer.find("data: [DONE]\n\n") == std::string_view::npos) return "the answer has no [DONE]";
  return "";
}

StreamLoadResult run_stream_load(asio::io_context& io, const std::vector<StreamRequest>& requests,
                                 const StreamLoadOptions& options) {
  CHECK(!requests.empty());
  CHECK_GT(options.connections, 0);
  return Load(io, requests, options).run();
}

}  // namespace tandem::bench
