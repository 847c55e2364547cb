// The parts of `tandem bench router`: mock workers, the load, and what is computed from their figures. With a real
// router in between they are tested in tests/e2e.
#include "src/bench/router_bench.h"

#include <gmock/gmock.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <memory>

#include "src/bench/mock_fleet.h"
#include "src/bench/pinned_process.h"
#include "src/bench/stream_load.h"

namespace tandem::bench {
namespace {

using ::testing::HasSubstr;

StreamRequest request_for(const std::string& body, std::string expected) {
  return {fmt::format("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{}", body.size(), body),
          std::move(expected)};
}

StreamLoadOptions ids_load(uint16_t port) {
  StreamLoadOptions load;
  load.port = port;
  load.key = "\"token_ids\":[";
  load.close = ']';
  load.connections = 4;
  load.seconds = 0.2;
  return load;
}

TEST(MockFleet, FindsTheAnswerOfAPrompt) {
  EXPECT_EQ(answer_of_body(R"({"prompt":[5,3,4],"n":1})", 10), 2);
  EXPECT_EQ(answer_of_body(R"({"prompt":[7]})", 7), 0);
  EXPECT_EQ(answer_of_body(R"({"prompt":[7)", 7), -1);
  EXPECT_EQ(answer_of_body(R"({"prompt":"text"})", 7), -1);
  EXPECT_EQ(answer_of_body("", 7), -1);
}

TEST(StreamLoad, EachRequestGetsItsOwnAnswer) {
  boost::asio::io_context io;
  for (const int gap_us : {0, 500}) {
    const auto fleet =
        MockFleet::listen(io, {.answers = {{10, 11, 12}, {20, 21, 22}}, .token_gap = std::chrono::microseconds(gap_us)})
            .value();
    const std::vector<StreamRequest> requests = {request_for(R"({"prompt":[1,1]})", "101112"),
                                                 request_for(R"({"prompt":[1,2]})", "202122")};
    for (const double rate : {0.0, 200.0}) {
      StreamLoadOptions load = ids_load(fleet->decode_ports().front());
      load.rate = rate;
      const StreamLoadResult result = run_stream_load(io, requests, load);
      EXPECT_EQ(result.failed, 0) << result.first_fault;
      EXPECT_GT(result.completed, 5);
      ASSERT_EQ(std::ssize(result.whole_s), result.completed);
      ASSERT_EQ(std::ssize(result.first_token_s), result.completed);
      for (size_t i = 0; i < result.whole_s.size(); ++i) {
        EXPECT_GT(result.first_token_s[i], 0);
        EXPECT_GE(result.whole_s[i], result.first_token_s[i]);
        EXPECT_GE(result.whole_s[i], 2e-6 * gap_us);
      }
    }
  }
}

// Answers the first request of each connection and then closes it.
void answer_once(boost::asio::ip::tcp::acceptor& acceptor, int& num_accepted) {
  acceptor.async_accept([&](boost::system::error_code ec, boost::asio::ip::tcp::socket socket) {
    if (ec) return;
    ++num_accepted;
    const auto kept = std::make_shared<boost::asio::ip::tcp::socket>(std::move(socket));
    const auto scratch = std::make_shared<std::string>(4096, '\0');
    kept->async_read_some(boost::asio::buffer(*scratch), [kept, scratch](boost::system::error_code read_ec, size_t) {
      static const std::string kAnswer = "HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
      if (!read_ec) boost::asio::write(*kept, boost::asio::buffer(kAnswer), read_ec);
    });
    answer_once(acceptor, num_accepted);
  });
}

TEST(StreamLoad, AKeptConnectionThatWasClosedIsNoFault) {
  boost::asio::io_context io;
  boost::asio::ip::tcp::acceptor acceptor(io, {boost::asio::ip::address_v4::loopback(), 0});
  int num_accepted = 0;
  answer_once(acceptor, num_accepted);
  StreamLoadOptions load = ids_load(acceptor.local_endpoint().port());
  load.connections = 1;
  const StreamLoadResult result = run_stream_load(io, {request_for("{}", "")}, load);
  EXPECT_EQ(result.failed, 0) << result.first_fault;
  EXPECT_GT(result.completed, 1);
  EXPECT_GE(num_accepted, result.completed);
}

TEST(StreamLoad, AnAnswerOfAnotherPromptIsAFault) {
  boost::asio::io_context io;
  const auto fleet = MockFleet::listen(io, {.answers = {{10, 11}, {20, 21}}}).value();
  const StreamLoadResult result =
      run_stream_load(io, {request_for(R"({"prompt":[2]})", "2021")}, ids_load(fleet->decode_ports().front()));
  EXPECT_EQ(result.completed, 0);
  EXPECT_GT(result.failed, 0);
  EXPECT_THAT(result.first_fault, HasSubstr("another answer"));
}

TEST(StreamLoad, ARefusedConnectionEndsTheLoad) {
  boost::asio::io_context io;
  uint16_t port = 0;
  { port = MockFleet::listen(io, {.answers = {{1}}}).value()->decode_ports().front(); }
  const StreamLoadResult result = run_stream_load(io, {request_for(R"({"prompt":[2]})", "")}, ids_load(port));
  EXPECT_EQ(result.completed, 0);
  EXPECT_GE(result.failed, 1);
  EXPECT_THAT(result.first_fault, HasSubstr("connecting failed"));
}

TEST(StreamLoad, SaysWhatIsWrongWithAnAnswer) {
  const StreamLoadOptions load;
  const StreamRequest request{"", "a b"};
  const std::string good =
      "HTTP/1.1 200 OK\r\n\r\ndata: {\"text\":\"a\"}\n\ndata: {\"text\":\" b\"}\n\ndata: [DONE]\n\n\r\n0\r\n\r\n";
  const auto without = [&good](std::string_view part) {
    std::string text = good;
    return text.replace(text.find(part), part.size(), "");
  };
  EXPECT_EQ(fault_of_answer(good, request, load), "");
  EXPECT_THAT(fault_of_answer(without("data: {\"text\":\" b\"}\n\n"), request, load), HasSubstr("lacks 2 bytes"));
  EXPECT_THAT(fault_of_answer(without("data: {\"text\":\"a\"}\n\n"), request, load), HasSubstr("another answer"));
  EXPECT_THAT(fault_of_answer(without("data: [DONE]\n\n"), request, load), HasSubstr("[DONE]"));
  EXPECT_THAT(fault_of_answer(without("\r\n0\r\n\r\n"), request, load), HasSubstr("not a whole stream"));
  EXPECT_THAT(fault_of_answer("HTTP/1.1 500 Internal Server Error\r\n\r\n", request, load), HasSubstr("500"));
}

TEST(PinnedProcess, SlopeIsThatOfTheBestLine) {
  EXPECT_DOUBLE_EQ(slope_of({0, 1, 2, 3}, {5, 7, 9, 11}), 2);
  EXPECT_DOUBLE_EQ(slope_of({0, 1, 2}, {1, 0, 1}), 0);
  EXPECT_DOUBLE_EQ(slope_of({1, 1}, {1, 2}), 0);
  EXPECT_DOUBLE_EQ(slope_of({}, {}), 0);
}

TEST(PinnedProcess, CountsProcessorTimeAndMemoryOfTheChild) {
  const std::string log = ::testing::TempDir() + "pinned_process_test.log";
  const int cpu = usable_cpus().back();
  PinnedProcess child = PinnedProcess::start("/bin/sh", {"-c", "while :; do :; done"}, log, cpu).value();
  while (child.cpu_seconds() < 0.05) ASSERT_TRUE(child.is_running());
  EXPECT_GT(child.resident_bytes(), 100 << 10);
  EXPECT_LT(child.resident_bytes(), 100 << 20);
}

}  // namespace
}  // namespace tandem::bench
