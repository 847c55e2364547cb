// Publications (pull) that nobody comes for: told from outside, or found here because their client has left.
#include "src/api/frontend_fixture.h"

namespace tandem::api {
namespace {

using engine::FinishReason;
using engine::TokenEvent;
using std::chrono::milliseconds;

constexpr const char* kPublish = R"("kv_transfer_params":{"do_remote_decode":true})";

class ReleaseTest : public FrontendTest {
 protected:
  // The last event of a leg that published; its JSON has about 7 bytes for each of `num_ids`.
  static TokenEvent published(const std::string& handle, int num_ids = 3) {
    TokenEvent event = tokens_event(byte_tokens("x"), 3, FinishReason::kLength);
    event.kv_transfer.emplace().do_remote_prefill = true;
    event.kv_transfer->remote_engine_id = "prefill:7";
    event.kv_transfer->remote_request_id = handle;
    event.kv_transfer->prompt_token_ids.assign(static_cast<size_t>(num_ids), 100'000);
    return event;
  }
  RawResponse release(const std::string& body) { return RawSocket(port).exchange(post_text(kReleasePath, body)); }
  void expect_nothing_released(size_t count) {
    std::this_thread::sleep_for(milliseconds(30));
    EXPECT_EQ(worker->wait_for_releases(0).size(), count);
  }
};

TEST_F(ReleaseTest, ATrustedCallerEndsAPublication) {
  start();
  const RawResponse answer = release(
      R"({"kv_transfer_params":{"remote_engine_id":"prefill:7","remote_request_id":"1-ab","do_remote_prefill":true,
          "remote_block_ids":[[1,2]],"prompt_token_ids":[5,6]}})");
  EXPECT_EQ(answer.status, 202);
  EXPECT_EQ(answer.body, "{}");
  EXPECT_EQ(worker->wait_for_releases(1), std::vector<std::string>{"prefill:7 1-ab"});
  // The whole object of a long prompt, too, which is read on another thread.
  std::string whole = R"({"kv_transfer_params":{"remote_engine_id":"prefill:7","remote_request_id":"3-cd","prompt_token_ids":[5)";
  for (int i = 0; i < 20'000; ++i) whole += ",5";
  EXPECT_EQ(release(whole + "]}}").status, 202);
  EXPECT_EQ(worker->wait_for_releases(2).back(), "prefill:7 3-cd");
  struct Bad {
    const char* body;
    const char* param;
  };
  for (const Bad& bad : {Bad{"", ""}, Bad{"[]", "kv_transfer_params"}, Bad{"{}", "kv_transfer_params"},
                         Bad{R"({"kv_transfer_params":7})", "kv_transfer_params"},
                         Bad{R"({"kv_transfer_params":{"remote_request_id":"1-ab"}})", "kv_transfer_params"},
                         Bad{R"({"kv_transfer_params":{"remote_engine_id":"prefill:7"}})", "kv_transfer_params"},
                         Bad{R"({"kv_transfer_params":{"remote_engine_id":"e","remote_request_id":5}})",
                             "kv_transfer_params.remote_request_id"}}) {
    const RawResponse refused = release(bad.body);
    EXPECT_EQ(refused.status, 400) << bad.body;
    if (*bad.param == '\0') continue;
    EXPECT_EQ(parse(refused.body)["error"]["param"], bad.param) << bad.body;
  }
  // It ends waiting, so it is taken while the server drains.
  loop.run([this] { frontend->drain(make_error(ErrorKind::kUnavailable, "the server is shutting down")); });
  EXPECT_EQ(release(R"({"kv_transfer_params":{"remote_engine_id":"e","remote_request_id":"2"}})").status, 202);
  EXPECT_EQ(worker->wait_for_releases(3).size(), 3U);
}

TEST_F(ReleaseTest, OnlyAServerThatPublishesTakesIt) {
  worker = std::make_unique<MockWorker>();
  start_closed({});
  const char* const body = R"({"kv_transfer_params":{"remote_engine_id":"e","remote_request_id":"1"}})";
  EXPECT_EQ(release(body).status, 400);
  loop.run([this] { frontend->open(demo_text(), *worker); });
  const RawResponse refused = release(body);
  EXPECT_EQ(refused.status, 400);
  EXPECT_EQ(parse(refused.body)["error"]["code"], "unsupported_parameter");
  expect_nothing_released(0);
  stop();
  FrontendOptions accepting;
  accepting.policy.accepts_kv_transfer = true;
  start_closed(std::move(accepting));
  EXPECT_EQ(release(body).status, 503);  // nobody serves yet
}

// The worker has published, and the client left before it could be told.
TEST_F(ReleaseTest, GivesBackWhatAClientThatLeftWasNotTold) {
  start();
  for (size_t i = 0; i < 2; ++i) {
    const bool streams = i == 1;
    {
      RawSocket socket(port);
      socket.send(completion_text(fmt::format(R"("stream":{},{})", streams, kPublish)));
      ASSERT_TRUE(worker->wait_for(i + 1));
    }
    ASSERT_NE(worker->wait_for_cancel(i), 0);
    worker->emit(i, published(fmt::format("left-{}", i)));  // it was on its way
    const std::vector<std::string> released = worker->wait_for_releases(i + 1);
    ASSERT_EQ(released.size(), i + 1);
    EXPECT_EQ(released.back(), fmt::format("prefill:7 left-{}", i));
  }
}

TEST_F(ReleaseTest, GivesBackWhatWasNotSentAsAWhole) {
  start();
  RawSocket patient(port);
  patient.send(completion_text(kPublish));
  ASSERT_TRUE(worker->wait_for(1));
  worker->emit(0, published("read", 1'000'000));
  EXPECT_NE(patient.read_response().body.find("\"remote_request_id\":\"read\""), std::string::npos);
  patient.close();
  expect_nothing_released(0);
  {
    RawSocket hasty(port, /*receive_buffer_bytes=*/4096);
    hasty.send(completion_text(kPublish));
    ASSERT_TRUE(worker->wait_for(2));
    worker->emit(1, published("unread", 1'000'000));
    ASSERT_TRUE(hasty.receive_until("HTTP/1.1 200"));
  }
  EXPECT_EQ(worker->wait_for_releases(1), std::vector<std::string>{"prefill:7 unread"});
}

// A stream that is cut when its last event, which names the publication, is written.
TEST_F(ReleaseTest, GivesBackWhatTheLastEventOfACutStreamNames) {
  start();
  RawSocket slow(port, /*receive_buffer_bytes=*/4096);
  slow.send(completion_text(fmt::format(R"("stream":true,{})", kPublish)));
  ASSERT_TRUE(worker->wait_for(1));
  worker->emit(0, published("cut", 100'000));  // above max_buffered_bytes
  EXPECT_EQ(worker->wait_for_releases(1), std::vector<std::string>{"prefill:7 cut"});
}

}  // namespace
}  // namespace tandem::api
