// Invariant I8 of docs/transfer.md as a table, at the level of HTTP: every fault of a leg, at every moment of it, in
// every mode, for streamed and whole answers, with and without another worker to go to. What the client gets, what the
// other leg is told, and that nothing is left behind.
#include <gtest/gtest.h>

#include "src/api/frontend_fixture.h"
#include "src/router/mock_worker.h"
#include "src/router/routed_worker.h"

namespace tandem::router {
namespace {

using api::eventually;
using std::chrono::milliseconds;

// What a client gets: the whole answer, or an error of this name. Before the first token it is an HTTP status; after it,
// in a stream, the same error as an event, and then the stream ends.
struct Answer {
  int status;
  const char* type;
  const char* code;  // "": null
};
constexpr Answer kWhole{200, "", ""};
constexpr Answer kRefused{400, "invalid_request_error", ""};
constexpr Answer kFull{429, "rate_limit_error", "queue_full"};
constexpr Answer kBroken{500, "server_error", "internal_error"};
constexpr Answer kBusy{503, "service_unavailable_error", "server_is_overloaded"};
constexpr Answer kGone{503, "service_unavailable_error", "worker_unavailable"};
constexpr Answer kLate{504, "server_error", "upstream_timeout"};

// What the other leg of the failed attempt is told.
enum class Other : uint8_t {
  kNever,      // it was not asked
  kCancelled,  // its connection was closed
  kCompleted,  // it had done its part
  kAlone,      // there is no other leg
  kNoCase,     // this fault does not exist in this mode
};
using enum Other;

struct Row {
  Role leg;
  MockFault fault;
  const char* name;
  Answer alone;    // no repeats are left
  Answer another;  // repeats are left, and another worker of either role is there
  Other push;
  Other pull;
  Other plain;
};

constexpr Role D = Role::kDecode, P = Role::kPrefill;

// Where an expectation surprises:
//  - A refusal (400), a full queue (429) and a passed deadline (504) are the answer even if another worker is there: the
//    next one would refuse as well, a full cluster must not be asked twice, and no time is left.
//  - In a pull nothing can be cancelled at prefill: it has answered before decode is asked. What it published is
//    released (the mocks count what is neither fetched nor released).
//  - Once decode has its first token, prefill has done its part: how its own answer ends concerns nobody.
//  - A worker that hangs is waited for until the deadline as long as it answers its health probes; one that is frozen is
//    given up, and its request goes elsewhere.
constexpr Row kRows[] = {
    // ---- Decode, before it has said anything
    // leg, fault, name                                     alone     another    push        pull        plain
    {D, MockFault::kRefuse, "refuses connections",          kGone,    kWhole,    kNever,     kCompleted, kAlone},
    {D, MockFault::kCut, "cuts",                            kGone,    kWhole,    kNever,     kCompleted, kAlone},
    {D, MockFault::kStatus400, "answers 400",               kRefused, kRefused,  kNever,     kCompleted, kAlone},
    {D, MockFault::kStatus429, "answers 429",               kFull,    kFull,     kNever,     kCompleted, kAlone},
    {D, MockFault::kStatus500, "answers 500",               kBroken,  kWhole,    kNever,     kCompleted, kAlone},
    {D, MockFault::kStatus503, "answers 503",               kBusy,    kWhole,    kNever,     kCompleted, kAlone},
    {D, MockFault::kGarbage, "sends garbage",               kBroken,  kWhole,    kNever,     kCompleted, kAlone},
    {D, MockFault::kHang, "hangs",                          kLate,    kLate,     kNever,     kCompleted, kAlone},
    {D, MockFault::kFreeze, "is frozen",                    kGone,    kWhole,    kNever,     kCompleted, kAlone},
    {D, MockFault::kEarly, "sends a token unreserved",      kBroken,  kWhole,    kNever,     kNoCase,    kNoCase},
    // ---- Decode, while prefill computes
    {D, MockFault::kCutWhileWaiting, "cuts",                kGone,    kWhole,    kCancelled, kNoCase,    kNoCase},
    {D, MockFault::kErrorWhileWaiting, "sends an error",    kBroken,  kWhole,    kCancelled, kNoCase,    kNoCase},
    {D, MockFault::kGarbageWhileWaiting, "sends garbage",   kBroken,  kWhole,    kCancelled, kNoCase,    kNoCase},
    {D, MockFault::kHangWhileWaiting, "hangs",              kLate,    kLate,     kCancelled, kNoCase,    kNoCase},
    // ---- Decode, after the first token: another worker goes on behind it
    {D, MockFault::kCutInStream, "cuts the stream",         kGone,    kWhole,    kCompleted, kCompleted, kAlone},
    {D, MockFault::kErrorInStream, "sends an error",        kBroken,  kWhole,    kCompleted, kCompleted, kAlone},
    {D, MockFault::kGarbageInStream, "sends garbage",       kBroken,  kWhole,    kCompleted, kCompleted, kAlone},
    {D, MockFault::kHangInStream, "hangs",                  kLate,    kLate,     kCompleted, kCompleted, kAlone},
    {D, MockFault::kFreezeInStream, "is frozen",            kGone,    kWhole,    kCompleted, kCompleted, kAlone},
    // ---- Prefill, before it has said anything: in a push decode waits, in a pull it is asked next
    {P, MockFault::kRefuse, "refuses connections",          kGone,    kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kCut, "cuts",                            kGone,    kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kStatus400, "answers 400",               kRefused, kRefused,  kCancelled, kNever,     kNoCase},
    {P, MockFault::kStatus429, "answers 429",               kFull,    kFull,     kCancelled, kNever,     kNoCase},
    {P, MockFault::kStatus500, "answers 500",               kBroken,  kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kStatus503, "answers 503",               kBusy,    kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kGarbage, "sends garbage",               kBroken,  kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kHang, "hangs",                          kLate,    kLate,     kCancelled, kNever,     kNoCase},
    {P, MockFault::kFreeze, "is frozen",                    kGone,    kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kNoParams, "publishes nothing",          kBroken,  kWhole,    kNoCase,    kNever,     kNoCase},
    // ---- Prefill, within its answer, with nothing handed over
    {P, MockFault::kCutInStream, "cuts its answer",         kGone,    kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kErrorInStream, "answers an error",      kBroken,  kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kGarbageInStream, "answers garbage",     kBroken,  kWhole,    kCancelled, kNever,     kNoCase},
    {P, MockFault::kHangInStream, "hangs",                  kLate,    kLate,     kCancelled, kNever,     kNoCase},
    {P, MockFault::kFreezeInStream, "is frozen",            kGone,    kWhole,    kCancelled, kNever,     kNoCase},
    // ---- Prefill, after decode has everything
    {P, MockFault::kCutAfterHandover, "cuts its answer",    kWhole,   kWhole,    kCompleted, kNoCase,    kNoCase},
    {P, MockFault::kHangAfterHandover, "hangs",             kWhole,   kWhole,    kCompleted, kNoCase,    kNoCase},
};

bool is_same(const Answer& a, const Answer& b) { return a.status == b.status && std::string(a.code) == b.code; }

constexpr int64_t kMaxTokens = 4;
constexpr int64_t kHangDeadlineMs = 300;  // of rows that end by their deadline
constexpr int64_t kDeadlineMs = 20'000;

class FaultMatrix : public api::FrontendTest {
 protected:
  ~FaultMatrix() override { tear_down(); }

  struct Case {
    const Row& row;
    LegMode mode;
    bool has_another;
    bool streams;

    const Answer& expected() const { return has_another ? row.another : row.alone; }
    bool ends_by_deadline() const { return is_same(row.alone, kLate) || row.fault == MockFault::kHangAfterHandover; }
    bool is_frozen() const { return row.fault == MockFault::kFreeze || row.fault == MockFault::kFreezeInStream; }
    // Tokens that the client has got when decode fails.
    size_t tokens_before() const {
      return row.leg == D && row.fault >= MockFault::kCutInStream && row.fault <= MockFault::kGarbageInStream ? 1 : 0;
    }
    int64_t deadline_ms() const { return ends_by_deadline() ? kHangDeadlineMs : kDeadlineMs; }
  };

  void set_up(const Case& c) {
    RouterOptions options;
    options.core.registry = {PolicyKind::kRoundRobin, PolicyKind::kRoundRobin};
    options.core.pull = c.mode == LegMode::kPull;
    options.core.repeats = c.has_another ? Repeats{2, 2} : Repeats{0, 0};
    options.core.unresponsive_us = 100'000;
    // What only the request itself meets is not to be found by a probe.
    options.probe_interval = milliseconds(c.is_frozen() ? 20 : 10'000);
    loop.run([&] {
      const size_t count = c.has_another ? 2 : 1;
      for (size_t i = 0; i < count; ++i) {
        decodes.push_back(std::make_unique<MockWorker>(loop.io, kv));
        options.decode_urls.push_back(decodes.back()->url());
        if (c.mode == LegMode::kPlain) continue;
        prefills.push_back(std::make_unique<MockWorker>(loop.io, kv));
        options.prefill_urls.push_back(prefills.back()->url());
      }
      metrics = std::make_unique<Registry>();
      router = RoutedWorker::create(loop.io, options, *metrics).value();
    });
    ASSERT_TRUE(eventually([&] { return sum_of("up") == static_cast<double>(decodes.size() + prefills.size()); }));
    api::FrontendOptions front;
    front.policy.accepts_kv_transfer = front.policy.accepts_resumed = false;
    start_closed(front);
    loop.run([&] {
      frontend->open(api::demo_text(), *router);
      (c.row.leg == D ? decodes : prefills)[0]->fail_with(c.row.fault);
    });
  }

  void tear_down() {
    stop();
    loop.run([this] {
      router.reset();
      decodes.clear();
      prefills.clear();
    });
  }

  double sum_of(const std::string& what) {
    return loop.run([&] {
      double sum = 0;
      const std::string text = metrics->expose(), name = "\ntandem:router_worker_" + what + "{";
      for (size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + 1)) {
        sum += std::stod(text.substr(text.find(' ', at + name.size())));
      }
      return sum;
    });
  }

  void run(const Case& c) {
    SCOPED_TRACE(fmt::format("{} {}, {}, {}, {}", role_name(c.row.leg), c.row.name,
                             c.mode == LegMode::kPlain  ? "plain"
                             : c.mode == LegMode::kPush ? "push"
                                                        : "pull",
                             c.streams ? "streamed" : "whole", c.has_another ? "another worker is there" : "alone"));
    set_up(c);
    const std::vector<TokenId> prompt = {5, 6, static_cast<TokenId>(7 + num_cases++)};
    const std::string body =
        fmt::format(R"({{"model":"demo","prompt":[{}],"max_tokens":{},"stream":{},"return_token_ids":true}})",
                    fmt::join(prompt, ","), kMaxTokens, c.streams);
    const int64_t begin_us = clock.now_us();
    const api::RawResponse response = api::RawSocket(port).exchange(api::post_text(
        "/v1/completions", body, fmt::format("X-Request-Timeout-Ms: {}\r\n", c.deadline_ms())));
    const int64_t took_ms = (clock.now_us() - begin_us) / 1000;
    expect_in_time(c, took_ms);
    c.streams ? expect_stream(c, response, prompt) : expect_whole(c, response, prompt);
    expect_rest(c);
    expect_other_leg(c);
    tear_down();
  }

  static void expect_in_time(const Case& c, int64_t took_ms) {
    if (is_same(c.expected(), kLate)) {
      EXPECT_GE(took_ms, kHangDeadlineMs - 20);
    }
    EXPECT_LE(took_ms, c.is_frozen() ? 3'000 : kHangDeadlineMs + 1'000);
  }

  static std::vector<TokenId> first_tokens(const std::vector<TokenId>& prompt, size_t count) {
    std::vector<TokenId> tokens;
    for (size_t i = 0; i < count; ++i) tokens.push_back(mock_token(prompt, i));
    return tokens;
  }
  static void expect_error(const Answer& expected, const api::Json& body) {
    ASSERT_TRUE(body.contains("error")) << body.dump();
    const api::Json& error = body["error"];
    EXPECT_EQ(error["type"], expected.type);
    EXPECT_EQ(error["code"], *expected.code == '\0' ? api::Json() : api::Json(expected.code)) << error.dump();
    EXPECT_FALSE(error["message"].get<std::string>().empty());
  }
  static void expect_http_error(const Answer& expected, const api::RawResponse& response) {
    EXPECT_EQ(response.status, expected.status) << response.body;
    const bool may_retry = expected.status == 429 || expected.status == 503;
    EXPECT_EQ(response.headers.contains("retry-after"), may_retry);
    expect_error(expected, parse(response.body));
  }

  static void expect_whole(const Case& c, const api::RawResponse& response, const std::vector<TokenId>& prompt) {
    if (!is_same(c.expected(), kWhole)) return expect_http_error(c.expected(), response);
    ASSERT_EQ(response.status, 200) << response.body;
    const api::Json choice = parse(response.body)["choices"][0];
    EXPECT_EQ(choice["token_ids"].get<std::vector<TokenId>>(), first_tokens(prompt, kMaxTokens));
    EXPECT_EQ(choice["finish_reason"], "length");
  }

  static void expect_stream(const Case& c, const api::RawResponse& response, const std::vector<TokenId>& prompt) {
    const bool is_whole = is_same(c.expected(), kWhole);
    if (!is_whole && c.tokens_before() == 0) return expect_http_error(c.expected(), response);
    ASSERT_EQ(response.status, 200) << response.body;  // 0 if the stream was cut
    std::vector<api::Json> events = parse_events(response.body);
    if (!is_whole) {
      ASSERT_FALSE(events.empty());
      expect_error(c.expected(), events.back());
      events.pop_back();
    }
    std::vector<TokenId> tokens;
    api::Json finish;
    for (const api::Json& event : events) {
      for (const api::Json& choice : event["choices"]) {
        for (const api::Json& token : choice["token_ids"]) tokens.push_back(token.get<TokenId>());
        finish = choice["finish_reason"];
      }
    }
    EXPECT_EQ(tokens, first_tokens(prompt, is_whole ? kMaxTokens : c.tokens_before()));
    EXPECT_EQ(finish, is_whole ? api::Json("length") : api::Json());
  }

  // No leg is open at a worker, no load is counted, and what was published has been fetched or released.
  void expect_rest(const Case& c) {
    const auto is_at_rest = [this] {
      int open = 0;
      loop.run([&] {
        for (const auto& mock : prefills) open += mock->num_open;
        for (const auto& mock : decodes) open += mock->num_open;
        open += static_cast<int>(kv->unread.size());
      });
      return open == 0 && router->num_requests() == 0 && num_requests() == 0 && sum_of("requests") == 0 &&
             sum_of("tokens") == 0;
    };
    EXPECT_TRUE(eventually(is_at_rest, milliseconds(c.ends_by_deadline() ? kHangDeadlineMs + 1'000 : 1'000)));
  }

  void expect_other_leg(const Case& c) {
    const Other expected = c.mode == LegMode::kPlain ? c.row.plain : c.mode == LegMode::kPush ? c.row.push : c.row.pull;
    if (expected == kAlone) return;
    loop.run([&] {
      const MockWorker& other = *(c.row.leg == D ? prefills : decodes)[0];
      if (expected == kNever) {
        // With a repeat the other leg belongs to the second attempt, which took turns.
        EXPECT_EQ(other.num_requests, 0);
        return;
      }
      ASSERT_GE(other.legs.size(), 1U);
      EXPECT_EQ(*other.legs[0], expected == kCancelled ? LegEnd::kClosed : LegEnd::kCompleted);
    });
  }

  void run_all(LegMode mode) {
    for (const Row& row : kRows) {
      const Other other = mode == LegMode::kPlain ? row.plain : mode == LegMode::kPush ? row.push : row.pull;
      if (other == kNoCase) continue;
      for (const bool has_another : {false, true}) {
        for (const bool streams : {false, true}) run({row, mode, has_another, streams});
      }
    }
    std::printf("%d cases\n", num_cases);
  }

  std::shared_ptr<MockKv> kv = std::make_shared<MockKv>();
  std::vector<std::unique_ptr<MockWorker>> prefills;
  std::vector<std::unique_ptr<MockWorker>> decodes;
  std::unique_ptr<Registry> metrics;
  std::unique_ptr<RoutedWorker> router;
  int num_cases = 0;
};

TEST_F(FaultMatrix, Push) { run_all(LegMode::kPush); }
TEST_F(FaultMatrix, Pull) { run_all(LegMode::kPull); }
TEST_F(FaultMatrix, Plain) { run_all(LegMode::kPlain); }

}  // namespace
}  // namespace tandem::router
