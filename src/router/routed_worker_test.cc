// The router against mock workers over real sockets: every fault of every leg, cancellation at every stage, and
// load counters that return to zero.
#include "src/router/routed_worker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "src/api/test_support.h"
#include "src/base/clock.h"
#include "src/router/mock_worker.h"

namespace tandem::router {
namespace {

using api::eventually;
using std::chrono::milliseconds;

// What one client saw.
struct Seen {
  std::vector<TokenId> tokens;
  std::optional<engine::FinishReason> finish;
  std::optional<Error> error;
  int terminal_events = 0;
};

class RoutedWorkerTest : public testing::Test {
 protected:
  ~RoutedWorkerTest() override {
    loop.run([this] {
      router.reset();
      prefills.clear();
      decodes.clear();
    });
    loop.stop();
  }

  void start(size_t num_prefill, size_t num_decode, RouterOptions options = {}) {
    loop.run([&] {
      for (size_t i = 0; i < num_prefill; ++i) prefills.push_back(std::make_unique<MockWorker>(loop.io, kv));
      for (size_t i = 0; i < num_decode; ++i) decodes.push_back(std::make_unique<MockWorker>(loop.io, kv));
      for (const auto& worker : prefills) options.prefill_urls.push_back(worker->url());
      for (const auto& worker : decodes) options.decode_urls.push_back(worker->url());
      router = RoutedWorker::create(loop.io, options, *metrics).value();
    });
    wait_for_up(num_prefill + num_decode);
  }

  void wait_for_up(size_t count) {
    EXPECT_TRUE(eventually(
        [&] { return loop.run([&] { return sum_of("tandem:router_worker_up"); }) == static_cast<double>(count); }));
  }

  engine::TokenRequest make_request(int64_t max_tokens = 4) {
    engine::TokenRequest request;
    request.external_id = fmt::format("req-{}", next_request_);
    request.prompt = {static_cast<TokenId>(next_request_++), 2, 3};
    request.sampling.max_tokens = max_tokens;
    return request;
  }

  RequestId submit(engine::TokenRequest request, std::shared_ptr<Seen> seen) {
    return router->submit(std::move(request), [seen](engine::TokenEvent&& event) {
      for (const engine::GeneratedToken& token : event.tokens) seen->tokens.push_back(token.token);
      if (event.finish) seen->finish = event.finish;
      if (event.error) seen->error = event.error;
      if (event.finish || event.error) ++seen->terminal_events;
    });
  }

  // Submits and waits for the end.
  Seen ask(engine::TokenRequest request, milliseconds limit = milliseconds(5'000)) {
    const auto seen = std::make_shared<Seen>();
    submit(std::move(request), seen);
    EXPECT_TRUE(eventually([&] { return loop.run([&] { return seen->terminal_events > 0; }); }, limit));
    return loop.run([&] { return *seen; });
  }

  double sum_of(const std::string& gauge) {
    double sum = 0;
    const std::string text = metrics->expose();
    for (size_t at = text.find("\n" + gauge + "{"); at != std::string::npos;
         at = text.find("\n" + gauge + "{", at + 1)) {
      sum += std::stod(text.substr(text.find(' ', at)));
    }
    return sum;
  }

  // Nothing of any request is left: no leg open at a worker, no load counted.
  bool is_at_rest() {
    return loop.run([this] {
      int open = 0;
      for (const auto& worker : prefills) open += worker->num_open;
      for (const auto& worker : decodes) open += worker->num_open;
      return open == 0 && router->num_requests() == 0 && sum_of("tandem:router_worker_requests") == 0 &&
             sum_of("tandem:router_worker_tokens") == 0;
    });
  }
  void expect_rest_within(milliseconds limit) {
    EXPECT_TRUE(eventually([this] { return is_at_rest(); }, limit));
  }

  std::vector<TokenId> expected_tokens(const engine::TokenRequest& request) {
    std::vector<TokenId> tokens;
    for (size_t i = 0; i < static_cast<size_t>(request.sampling.max_tokens); ++i) {
      tokens.push_back(mock_token(request.prompt, i));
    }
    return tokens;
  }

  api::LoopThread loop;
  std::unique_ptr<Registry> metrics = std::make_unique<Registry>();
  std::shared_ptr<MockKv> kv = std::make_shared<MockKv>();
  std::vector<std::unique_ptr<MockWorker>> prefills;
  std::vector<std::unique_ptr<MockWorker>> decodes;
  std::unique_ptr<RoutedWorker> router;
  int next_request_ = 1;
};

TEST_F(RoutedWorkerTest, PlainRelaysTheStream) {
  start(0, 1);
  const engine::TokenRequest request = make_request();
  const Seen seen = ask(request);
  EXPECT_EQ(seen.tokens, expected_tokens(request));
  EXPECT_EQ(seen.finish, engine::FinishReason::kLength);
  EXPECT_FALSE(loop.run([&] { return decodes[0]->bodies.at(0).contains("kv_transfer_params"); }));
  expect_rest_within(milliseconds(1'000));
}

TEST_F(RoutedWorkerTest, PushSendsBothLegsOfOneRequest) {
  start(1, 1);
  const engine::TokenRequest request = make_request();
  const Seen seen = ask(request);
  EXPECT_EQ(seen.tokens, expected_tokens(request));
  expect_rest_within(milliseconds(1'000));
  loop.run([&] {
    const nlohmann::json& to_decode = decodes[0]->bodies.at(0);
    const nlohmann::json& to_prefill = prefills[0]->bodies.at(0);
    EXPECT_EQ(to_decode["kv_transfer_params"]["transfer_mode"], "push");
    EXPECT_EQ(to_prefill["kv_transfer_params"]["remote_request_id"], "push-1");
    EXPECT_EQ(to_prefill["prompt"], to_decode["prompt"]);
    for (const auto& headers : {decodes[0]->headers.at(0), prefills[0]->headers.at(0)}) {
      EXPECT_EQ(*api::find_header(headers, "x-request-id"), request.external_id);
      const int64_t remaining = std::stoll(*api::find_header(headers, "x-request-timeout-ms"));
      EXPECT_GT(remaining, 590'000);
      EXPECT_LE(remaining, 600'000);
    }
  });
}

TEST_F(RoutedWorkerTest, PullAsksPrefillFirst) {
  start(1, 1, {.core = {.pull = true}});
  const engine::TokenRequest request = make_request();
  EXPECT_EQ(ask(request).tokens, expected_tokens(request));
  loop.run([&] {
    EXPECT_EQ(prefills[0]->bodies.at(0)["kv_transfer_params"]["do_remote_decode"], true);
    EXPECT_EQ(decodes[0]->bodies.at(0)["kv_transfer_params"]["vendor"], nlohmann::json({7}));
  });
  expect_rest_within(milliseconds(1'000));
}

// The client leaves when prefill's answer is under way: what it published is released all the same.
TEST_F(RoutedWorkerTest, ReleasesWhatAnAnswerThatCrossesTheCancelPublished) {
  start(1, 1, {.core = {.pull = true}});
  const auto seen = std::make_shared<Seen>();
  RequestId id;
  loop.run([&] {
    prefills[0]->on_answered = [&] { router->cancel(id); };
    id = submit(make_request(), seen);
  });
  EXPECT_TRUE(eventually([&] { return loop.run([&] { return kv->num_released == 1; }); }, milliseconds(1'000)));
  expect_rest_within(milliseconds(1'000));
  loop.run([&] {
    EXPECT_EQ(kv->next_handle, 2U);
    EXPECT_TRUE(kv->unread.empty());
    EXPECT_EQ(decodes[0]->num_requests, 0);
    EXPECT_EQ(seen->terminal_events, 0);
  });
  EXPECT_NE(metrics->expose().find("\ntandem:router_released_publications_total 1"), std::string::npos);
}

// One that has not answered hears at once that it need not.
TEST_F(RoutedWorkerTest, ACancelledPullClosesPrefillsLegAtOnce) {
  start(1, 1, {.core = {.pull = true}});
  loop.run([&] { prefills[0]->fail_with(MockFault::kHang); });
  const RequestId id = submit(make_request(), std::make_shared<Seen>());
  EXPECT_TRUE(eventually([&] { return loop.run([&] { return prefills[0]->num_open == 1; }); }));
  loop.run([&] { router->cancel(id); });
  expect_rest_within(milliseconds(100));
  loop.run([&] {
    EXPECT_EQ(*prefills[0]->legs.at(0), LegEnd::kClosed);
    EXPECT_EQ(kv->num_released, 0);
  });
}

// As a rank group's endpoint does, which does not know whose it is.
TEST_F(RoutedWorkerTest, TellsAllWorkersOfAReleaseFromOutside) {
  start(0, 3);
  transfer::KvTransferParams publication;
  publication.remote_engine_id = "mock:1";
  publication.remote_request_id = "pull-7";
  router->release(publication);
  EXPECT_TRUE(eventually([&] { return loop.run([&] { return kv->num_released == 3; }); }));
}

TEST_F(RoutedWorkerTest, RefusesTransferFieldsFromOutside) {
  start(0, 1);
  engine::TokenRequest request = make_request();
  request.kv_transfer.emplace();
  const Seen seen = ask(std::move(request));
  EXPECT_EQ(seen.error->kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(seen.error->param, "kv_transfer_params");
  EXPECT_EQ(loop.run([&] { return decodes[0]->num_requests; }), 0);
}

TEST_F(RoutedWorkerTest, WithoutWorkersIsUnavailable) {
  start(0, 1, {.core = {.rescue_us = 200'000}, .probe_interval = milliseconds(50)});
  loop.run([&] { decodes[0]->healthy = false; });
  EXPECT_TRUE(eventually([&] { return !router->is_ready(); }, milliseconds(6'000)));
  for (int i = 0; i < 2; ++i) {  // the first waits for it to come back, the second knows better
    const int64_t begin_us = SteadyClock().now_us();
    EXPECT_EQ(ask(make_request()).error->kind, ErrorKind::kUnavailable);
    EXPECT_LT(SteadyClock().now_us() - begin_us, i == 0 ? 1'000'000 : 100'000);
  }
  expect_rest_within(milliseconds(1'000));
}

TEST_F(RoutedWorkerTest, NewRequestsWaitForAWorkerThatWasThereAMomentAgo) {
  start(0, 1, {.probe_interval = milliseconds(50)});
  loop.run([&] { decodes[0]->kill(); });
  EXPECT_TRUE(eventually([&] { return !router->is_ready(); }));
  const auto seen = std::make_shared<Seen>();
  const engine::TokenRequest request = make_request();
  submit(request, seen);
  std::this_thread::sleep_for(milliseconds(300));
  EXPECT_EQ(loop.run([&] { return seen->terminal_events; }), 0);
  loop.run([&] { decodes[0]->revive(); });
  EXPECT_TRUE(eventually([&] { return loop.run([&] { return seen->terminal_events > 0; }); }));
  EXPECT_EQ(seen->tokens, expected_tokens(request));
  expect_rest_within(milliseconds(1'000));
}

// Fault x leg: what the client sees when no further attempt is made, and that the other leg is closed.
struct FaultCase {
  Role leg;
  MockFault fault;
  ErrorKind kind;
  size_t tokens_before;
};

TEST_F(RoutedWorkerTest, FaultTableWithoutRetries) {
  start(1, 1, {.core = {.registry = {.breaker = {.failures_to_open = 1'000}}, .repeats = {0, 0}}});
  const FaultCase cases[] = {
      {Role::kPrefill, MockFault::kStatus500, ErrorKind::kInternal, 0},
      {Role::kPrefill, MockFault::kStatus503, ErrorKind::kUnavailable, 0},
      {Role::kPrefill, MockFault::kStatus429, ErrorKind::kResourceExhausted, 0},
      {Role::kPrefill, MockFault::kStatus400, ErrorKind::kInvalidArgument, 0},
      {Role::kPrefill, MockFault::kCut, ErrorKind::kUnavailable, 0},
      {Role::kPrefill, MockFault::kHang, ErrorKind::kDeadlineExceeded, 0},
      {Role::kDecode, MockFault::kStatus500, ErrorKind::kInternal, 0},
      {Role::kDecode, MockFault::kStatus503, ErrorKind::kUnavailable, 0},
      {Role::kDecode, MockFault::kStatus429, ErrorKind::kResourceExhausted, 0},
      {Role::kDecode, MockFault::kStatus400, ErrorKind::kInvalidArgument, 0},
      {Role::kDecode, MockFault::kCut, ErrorKind::kUnavailable, 0},
      {Role::kDecode, MockFault::kHang, ErrorKind::kDeadlineExceeded, 0},
      {Role::kDecode, MockFault::kCutInStream, ErrorKind::kUnavailable, 1},
      {Role::kDecode, MockFault::kErrorInStream, ErrorKind::kInternal, 1},
      {Role::kDecode, MockFault::kHangInStream, ErrorKind::kDeadlineExceeded, 1},
  };
  for (const FaultCase& c : cases) {
    SCOPED_TRACE(fmt::format("{} fault {}", role_name(c.leg), static_cast<int>(c.fault)));
    wait_for_up(2);
    MockWorker& failing = c.leg == Role::kPrefill ? *prefills[0] : *decodes[0];
    loop.run([&] { failing.fault = c.fault; });
    engine::TokenRequest request = make_request();
    request.deadline_us = SteadyClock().now_us() + 400'000;
    const int64_t begin_us = SteadyClock().now_us();
    const Seen seen = ask(request, milliseconds(3'000));
    ASSERT_TRUE(seen.error.has_value());
    EXPECT_EQ(seen.error->kind, c.kind) << seen.error->message;
    EXPECT_EQ(seen.tokens.size(), c.tokens_before);
    EXPECT_EQ(seen.terminal_events, 1);
    if (c.kind == ErrorKind::kDeadlineExceeded) {
      const int64_t waited_us = SteadyClock().now_us() - begin_us;
      EXPECT_GE(waited_us, 380'000);
      EXPECT_LE(waited_us, 1'500'000);
      EXPECT_NE(seen.error->message.find("deadline passed while"), std::string::npos) << seen.error->message;
    }
    expect_rest_within(milliseconds(1'000));  // the healthy leg too
    loop.run([&] { failing.fault = MockFault::kNone; });
  }
}

TEST_F(RoutedWorkerTest, RetriesOnAnotherWorkerUntilTheFirstToken) {
  for (const MockFault fault : {MockFault::kStatus500, MockFault::kStatus503, MockFault::kCut}) {
    for (const Role leg : {Role::kPrefill, Role::kDecode}) {
      SCOPED_TRACE(fmt::format("{} fault {}", role_name(leg), static_cast<int>(fault)));
      loop.run([this] {
        router.reset();
        prefills.clear();
        decodes.clear();
        metrics = std::make_unique<Registry>();
      });
      start(2, 2, {.core = {.registry = {PolicyKind::kRoundRobin, PolicyKind::kRoundRobin}}});
      loop.run([&] { (leg == Role::kPrefill ? prefills : decodes)[0]->fault = fault; });
      const engine::TokenRequest request = make_request();
      const Seen seen = ask(request);
      EXPECT_EQ(seen.tokens, expected_tokens(request));
      EXPECT_FALSE(seen.error) << seen.error->message;
      loop.run([&] {
        const auto& workers = leg == Role::kPrefill ? prefills : decodes;
        EXPECT_EQ(workers[0]->num_requests, 1);
        EXPECT_EQ(workers[1]->num_requests, 1);
      });
      expect_rest_within(milliseconds(1'000));
    }
  }
}

TEST_F(RoutedWorkerTest, NeverRetriesACallersFaultNorAfterTheFirstToken) {
  start(0, 2, {.core = {.registry = {PolicyKind::kRoundRobin, PolicyKind::kRoundRobin}, .repeats = {2, 0}}});
  loop.run([&] { decodes[0]->fault = MockFault::kStatus400; });
  EXPECT_EQ(ask(make_request()).error->kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(loop.run([&] { return decodes[1]->num_requests; }), 0);
  EXPECT_TRUE(ask(make_request()).finish.has_value());  // in turn: the other worker
  loop.run([&] { decodes[0]->fault = MockFault::kErrorInStream; });
  const Seen seen = ask(make_request());
  EXPECT_EQ(seen.tokens.size(), 1u);
  EXPECT_EQ(seen.error->kind, ErrorKind::kInternal);
  EXPECT_EQ(loop.run([&] { return decodes[1]->num_requests; }), 1);
}

TEST_F(RoutedWorkerTest, ClientsThatLeaveCloseBothLegsWithinASecond) {
  struct Case {
    const char* stage;
    MockFault prefill;
    MockFault decode;
  };
  start(1, 1);
  for (const Case& c : {Case{"decode reserves", MockFault::kNone, MockFault::kHang},
                        Case{"prefill computes", MockFault::kHang, MockFault::kNone},
                        Case{"decode streams", MockFault::kNone, MockFault::kHangInStream}}) {
    SCOPED_TRACE(c.stage);
    loop.run([&] { prefills[0]->fault = c.prefill, decodes[0]->fault = c.decode; });
    const auto seen = std::make_shared<Seen>();
    const RequestId id = submit(make_request(), seen);
    EXPECT_TRUE(eventually([&] {
      return loop.run([&] {
        return prefills[0]->num_open + decodes[0]->num_open >= (c.prefill == MockFault::kHang ? 2 : 1) &&
               (c.decode != MockFault::kHangInStream || seen->tokens.size() == 1);
      });
    }));
    router->cancel(id);
    expect_rest_within(milliseconds(1'000));
    EXPECT_EQ(loop.run([&] { return seen->terminal_events; }), 0);
  }
  // A cancel that overtakes its own submit, both made on the router's thread.
  loop.run([&] { router->cancel(submit(make_request(), std::make_shared<Seen>())); });
  expect_rest_within(milliseconds(1'000));
}

TEST_F(RoutedWorkerTest, BoundsWhatIsInFlight) {
  start(0, 1, {.core = {.max_requests = 2, .queue_size = 0}});
  loop.run([&] { decodes[0]->fault = MockFault::kHang; });
  const auto seen = std::make_shared<Seen>();
  const RequestId first = submit(make_request(), seen);
  submit(make_request(), seen);
  EXPECT_EQ(ask(make_request()).error->kind, ErrorKind::kResourceExhausted);
  router->cancel(first);
  loop.run([&] { decodes[0]->fault = MockFault::kNone; });
  EXPECT_TRUE(ask(make_request()).finish.has_value());
}

TEST_F(RoutedWorkerTest, AKilledWorkerGoesOutAndComesBack) {
  start(1, 2, {.probe_interval = milliseconds(100)});
  loop.run([&] { decodes[0]->fault = MockFault::kHangInStream; });
  const auto seen = std::make_shared<Seen>();
  const auto other = std::make_shared<Seen>();
  submit(make_request(), seen);
  submit(make_request(), other);
  EXPECT_TRUE(eventually([&] { return loop.run([&] { return other->finish || seen->finish; }); }));
  const int64_t killed_us = SteadyClock().now_us();
  loop.run([&] { decodes[0]->kill(); });
  EXPECT_TRUE(
      eventually([&] { return loop.run([&] { return seen->terminal_events + other->terminal_events == 2; }); }));
  EXPECT_LT(SteadyClock().now_us() - killed_us, 1'000'000);
  wait_for_up(2);
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(ask(make_request()).finish.has_value());
  loop.run([&] { decodes[0]->fault = MockFault::kNone, decodes[0]->revive(); });
  wait_for_up(3);
  const int before = loop.run([&] { return decodes[0]->num_requests; });
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(ask(make_request()).finish.has_value());
  EXPECT_GT(loop.run([&] { return decodes[0]->num_requests; }), before);
}

// Its breaker has opened, but what failed was the process before.
TEST_F(RoutedWorkerTest, AWorkerThatIsBackIsTriedAtOnce) {
  CoreOptions core{.registry = {PolicyKind::kRoundRobin, PolicyKind::kRoundRobin}};
  core.registry.breaker = {.failures_to_open = 1, .open_us = 60'000'000};
  start(0, 2, {.core = core, .probe_interval = milliseconds(50)});
  loop.run([&] { decodes[0]->fault = MockFault::kCut; });
  EXPECT_TRUE(ask(make_request()).finish.has_value());
  loop.run([&] { decodes[0]->kill(); });
  wait_for_up(1);
  EXPECT_EQ(loop.run([&] { return sum_of("tandem:router_worker_left_out"); }), 1);
  loop.run([&] { decodes[0]->fault = MockFault::kNone, decodes[0]->revive(); });
  wait_for_up(2);
  const int before = loop.run([&] { return decodes[0]->num_requests; });
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(ask(make_request()).finish.has_value());
  EXPECT_GT(loop.run([&] { return decodes[0]->num_requests; }), before + 1);
  EXPECT_EQ(loop.run([&] { return sum_of("tandem:router_worker_left_out"); }), 0);
}

TEST_F(RoutedWorkerTest, RefusesWrongWorkers) {
  const auto error_of = [&](RouterOptions options) {
    return loop.run([&] { return RoutedWorker::create(loop.io, options, *metrics).error().message; });
  };
  EXPECT_NE(error_of({.prefill_urls = {"http://a:1"}}).find("--decode"), std::string::npos);
  EXPECT_NE(error_of({.decode_urls = {"https://a:1"}}).find("https://a:1"), std::string::npos);
  EXPECT_EQ(error_of({.decode_urls = {"a:1", "a:1"}}), "decode worker a:1 is given twice");
}

// Random faults, random cancels: every request ends exactly once with its own tokens or an error, and nothing is left.
TEST_F(RoutedWorkerTest, NothingIsLeftAfterAThousandDisturbedRequests) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  start(2, 2, {.probe_interval = milliseconds(100)});
  constexpr MockFault kFaults[] = {MockFault::kNone,        MockFault::kNone,          MockFault::kNone,
                                   MockFault::kStatus500,   MockFault::kCut,           MockFault::kHang,
                                   MockFault::kCutInStream, MockFault::kErrorInStream, MockFault::kStatus429};
  struct Client {
    engine::TokenRequest request;
    std::shared_ptr<Seen> seen;
    RequestId id;
    bool cancelled = false;
  };
  std::vector<Client> clients;
  for (int i = 0; i < 1'000; ++i) {
    if (i % 10 == 0) {
      std::this_thread::sleep_for(milliseconds(3));  // some of the last ten finish before the faults change
      ASSERT_TRUE(eventually([&] { return router->is_ready(); }));
      loop.run([&] {
        for (auto* workers : {&prefills, &decodes}) {
          for (const auto& worker : *workers) worker->fault = kFaults[random() % std::size(kFaults)];
        }
      });
    }
    engine::TokenRequest request = make_request(static_cast<int64_t>(1 + random() % 6));
    request.deadline_us = SteadyClock().now_us() + 1'000'000;
    const auto seen = std::make_shared<Seen>();
    clients.push_back({request, seen, submit(request, seen)});
    if (random() % 4 == 0) {
      Client& victim = clients[random() % clients.size()];
      victim.cancelled = true;
      router->cancel(victim.id);
    }
  }
  loop.run([&] {
    for (auto* workers : {&prefills, &decodes}) {
      for (const auto& worker : *workers) worker->fault = MockFault::kNone;
    }
  });
  const auto all_ended = [&] {
    return loop.run([&] {
      return std::all_of(clients.begin(), clients.end(),
                         [](const Client& client) { return client.cancelled || client.seen->terminal_events == 1; });
    });
  };
  EXPECT_TRUE(eventually(all_ended, milliseconds(5'000)));
  expect_rest_within(milliseconds(2'000));
  int completed = 0;
  for (const Client& client : clients) {
    EXPECT_LE(client.seen->terminal_events, 1);
    const std::vector<TokenId> expected = expected_tokens(client.request);
    ASSERT_LE(client.seen->tokens.size(), expected.size());
    EXPECT_TRUE(std::equal(client.seen->tokens.begin(), client.seen->tokens.end(), expected.begin()));
    if (client.seen->finish) {
      EXPECT_EQ(client.seen->tokens, expected);
      ++completed;
    }
  }
  EXPECT_GT(completed, 50);
}

}  // namespace
}  // namespace tandem::router
