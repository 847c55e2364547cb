// The router's decisions, driven by hand: no sockets, no clock.
#include "src/router/router_core.h"

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <random>

namespace tandem::router {
namespace {

constexpr int64_t kSecond = 1'000'000;

struct Opened {
  LegId id;
  Role role;
  WorkerId worker;
  std::string transfer;
  std::vector<TokenId> resumed;
  int64_t deadline_us;
  bool publishes;
};

struct FakePort final : LegPort {
  void open_leg(const LegOrder& order) override {
    opened.push_back({order.id, order.role, order.worker, order.transfer, order.request.resumed, order.deadline_us,
                      order.publishes});
    open[order.id] = order.worker;
  }
  void cancel_leg(LegId id) override {
    EXPECT_EQ(open.erase(id), 1u);
    cancelled.push_back(id);
  }
  void release(WorkerId worker, const std::string& transfer) override { released.emplace_back(worker, transfer); }
  std::vector<Opened> opened;
  std::map<LegId, WorkerId> open;
  std::vector<LegId> cancelled;
  std::vector<std::pair<WorkerId, std::string>> released;
};

struct Answer {
  std::optional<transfer::KvTransferParams> transfer;
  std::vector<TokenId> tokens;
  bool finished = false;
  std::optional<Error> error;
};

class RouterCoreTest : public testing::Test {
 protected:
  void start(int num_prefill, int num_decode, CoreOptions options = {}) {
    core = std::make_unique<RouterCore>(options, port, metrics);
    for (int i = 0; i < num_prefill; ++i)
      prefills.push_back(core->add_worker(Role::kPrefill, fmt::format("p{}", i)).value());
    for (int i = 0; i < num_decode; ++i)
      decodes.push_back(core->add_worker(Role::kDecode, fmt::format("d{}", i)).value());
    for (const WorkerId id : prefills) core->probe_result(id, true, now);
    for (const WorkerId id : decodes) core->probe_result(id, true, now);
  }
  std::shared_ptr<Answer> submit(engine::TokenRequest request) {
    auto answer = std::make_shared<Answer>();
    last_id = RequestId(++next_id);
    core->submit(
        last_id, std::move(request),
        [answer](engine::TokenEvent&& event) {
          EXPECT_FALSE(answer->finished || answer->error);
          for (const engine::GeneratedToken& token : event.tokens) answer->tokens.push_back(token.token);
          if (event.kv_transfer) answer->transfer = event.kv_transfer;
          answer->finished = event.finish.has_value();
          answer->error = std::move(event.error);
        },
        now);
    return answer;
  }
  std::shared_ptr<Answer> submit(int64_t max_tokens = 4) {
    engine::TokenRequest request;
    request.prompt = {1, 2, 3};
    request.sampling.max_tokens = max_tokens;
    return submit(std::move(request));
  }
  void token(LegId leg, TokenId id, bool last = false) {
    engine::TokenEvent event;
    event.tokens.push_back({.token = id, .logprob = 0, .top_logprobs = {}});
    if (last) event.finish = engine::FinishReason::kLength;
    if (last) port.open.erase(leg);
    core->leg_event(leg, std::move(event), now);
  }
  void fail(LegId leg, ErrorKind kind, bool reached = true, bool died = false) {
    port.open.erase(leg);
    core->leg_failed(leg, {make_error(kind, "it broke"), reached, died}, now);
  }
  // Requests that a decode worker failed with this cause, and what became of them.
  int64_t after(WorkerId worker, const char* cause, const char* outcome) {
    const std::string labels = fmt::format("role=\"decode\",cause=\"{}\",outcome=\"{}\"", cause, outcome);
    const std::string& url = core->workers().worker(worker).url;
    return count(fmt::format("tandem:router_after_failure_total{{worker=\"{}\",{}}}", url, labels));
  }
  const Opened& leg(size_t index) { return port.opened.at(index); }
  void advance(int64_t us) {
    const int64_t until = now + us;
    while (core->next_tick_us() <= until) {
      now = std::max(now, core->next_tick_us());
      core->tick(now);
    }
    now = until;
  }
  void expect_rest() {
    EXPECT_EQ(core->num_requests(), 0);
    EXPECT_EQ(core->num_legs(), 0);
    EXPECT_EQ(core->num_waiting(), 0);
    EXPECT_EQ(core->next_tick_us(), INT64_MAX);
    EXPECT_TRUE(port.open.empty());
    for (const RegisteredWorker& worker : core->workers().workers()) {
      EXPECT_EQ(worker.load->requests, 0) << worker.url;
      EXPECT_EQ(worker.load->tokens, 0) << worker.url;
    }
  }
  int64_t count(const std::string& series) {
    const std::string text = metrics.expose();
    const size_t at = text.find("\n" + series + " ");
    return at == std::string::npos ? 0 : std::stol(text.substr(at + series.size() + 2));
  }

  Registry metrics;
  FakePort port;
  std::unique_ptr<RouterCore> core;
  std::vector<WorkerId> prefills;
  std::vector<WorkerId> decodes;
  int64_t now = 100 * kSecond;
  uint64_t next_id = 0;
  RequestId last_id;
};

TEST_F(RouterCoreTest, AnAnswerMovesToAnotherWorkerBehindItsTokens) {
  start(0, 2);
  const auto answer = submit();
  token(leg(0).id, 11);
  token(leg(0).id, 12);
  fail(leg(0).id, ErrorKind::kUnavailable, false, true);
  ASSERT_EQ(port.opened.size(), 2u);
  EXPECT_NE(leg(1).worker, leg(0).worker);
  EXPECT_EQ(leg(1).resumed, (std::vector<TokenId>{11, 12}));
  EXPECT_EQ(leg(1).deadline_us, leg(0).deadline_us);
  token(leg(0).id, 99);  // a late word of the dead worker
  token(leg(1).id, 13);
  token(leg(1).id, 14, true);
  EXPECT_EQ(answer->tokens, (std::vector<TokenId>{11, 12, 13, 14}));
  EXPECT_TRUE(answer->finished);
  EXPECT_EQ(core->num_migrations(), 1);
  expect_rest();
}

engine::TokenRequest reserving_request() {
  engine::TokenRequest request;
  request.prompt = {1, 2, 3};
  request.sampling.max_tokens = 2;
  request.kv_transfer.emplace();
  request.kv_transfer->do_remote_prefill = true;
  request.kv_transfer->mode = transfer::TransferMode::kPush;
  return request;
}

// This router spreads the decode role over ranks; the other leg is its caller's.
TEST_F(RouterCoreTest, ATransferOfTheCallerIsHandedOn) {
  start(0, 2, {.passes_transfers = true});
  const std::shared_ptr<Answer> answer = submit(reserving_request());
  EXPECT_EQ(leg(0).transfer, transfer::to_json(*reserving_request().kv_transfer).dump());
  core->leg_reserved(leg(0).id, R"({"do_remote_decode":true,"remote_host":"h","remote_port":7,"remote_request_id":"1-2"})",
                     now);
  ASSERT_TRUE(answer->transfer.has_value());
  EXPECT_EQ(answer->transfer->remote_host, "h");
  EXPECT_EQ(answer->transfer->remote_port, 7);
  EXPECT_EQ(answer->transfer->remote_request_id, "1-2");
  token(leg(0).id, 5);
  token(leg(0).id, 6, true);
  EXPECT_EQ(answer->tokens, (std::vector<TokenId>{5, 6}));
  EXPECT_TRUE(answer->finished);
  expect_rest();
}

// Its handles are used once: the caller makes new ones.
TEST_F(RouterCoreTest, ATransferOfTheCallerIsNotRepeated) {
  start(0, 2, {.passes_transfers = true});
  const std::shared_ptr<Answer> answer = submit(reserving_request());
  fail(leg(0).id, ErrorKind::kUnavailable, true, true);
  ASSERT_TRUE(answer->error.has_value());
  EXPECT_EQ(port.opened.size(), 1u);
  expect_rest();
}

TEST_F(RouterCoreTest, WithoutThatATransferIsRefusedAndHidden) {
  start(0, 1);
  EXPECT_EQ(submit(reserving_request())->error->param, "kv_transfer_params");
  const std::shared_ptr<Answer> answer = submit(1);
  engine::TokenEvent event;
  event.tokens.push_back({.token = 4, .logprob = 0, .top_logprobs = {}});
  event.finish = engine::FinishReason::kLength;
  event.kv_transfer.emplace();
  port.open.erase(leg(0).id);
  core->leg_event(leg(0).id, std::move(event), now);
  EXPECT_TRUE(answer->finished);
  EXPECT_FALSE(answer->transfer.has_value());
}

TEST_F(RouterCoreTest, AnAnswerThatWasResumedAlreadyMovesOn) {
  start(0, 2);
  engine::TokenRequest request;
  request.prompt = {1, 2, 3};
  request.resumed = {7, 8};
  request.sampling.max_tokens = 5;
  const std::shared_ptr<Answer> answer = submit(std::move(request));
  EXPECT_EQ(leg(0).resumed, (std::vector<TokenId>{7, 8}));
  token(leg(0).id, 9);
  fail(leg(0).id, ErrorKind::kUnavailable, true, true);
  EXPECT_EQ(leg(1).resumed, (std::vector<TokenId>{7, 8, 9}));
  token(leg(1).id, 10, true);
  EXPECT_EQ(answer->tokens, (std::vector<TokenId>{9, 10}));
  expect_rest();
}

TEST_F(RouterCoreTest, WaitsForAWorkerToComeBackAndThenGoesOn) {
  start(0, 1);
  const auto answer = submit();
  token(leg(0).id, 11);
  fail(leg(0).id, ErrorKind::kUnavailable, false, true);
  core->probe_result(decodes[0], false, now);
  EXPECT_EQ(core->num_waiting(), 1);
  advance(4 * kSecond);
  EXPECT_EQ(port.opened.size(), 1u);
  core->probe_result(decodes[0], true, now);
  core->probe_result(decodes[0], true, now);
  ASSERT_EQ(port.opened.size(), 2u);
  EXPECT_EQ(leg(1).resumed, std::vector<TokenId>{11});
  token(leg(1).id, 12, true);
  EXPECT_TRUE(answer->finished);
  expect_rest();
}

TEST_F(RouterCoreTest, GivesUpWhenNobodyComesInTime) {
  start(0, 1, {.rescue_us = 3 * kSecond});
  const auto answer = submit();
  token(leg(0).id, 11);
  fail(leg(0).id, ErrorKind::kUnavailable, false, true);
  core->probe_result(decodes[0], false, now);
  advance(3 * kSecond - 1);
  EXPECT_FALSE(answer->error.has_value());
  advance(1);
  ASSERT_TRUE(answer->error.has_value());
  EXPECT_EQ(answer->error->message, "it broke");
  expect_rest();
  // A new request does not wait: there is nothing to lose yet.
  EXPECT_EQ(submit()->error->kind, ErrorKind::kUnavailable);
}

TEST_F(RouterCoreTest, AWorkerThatFailedARequestGetsItAgainOnlyAfterAWhile) {
  start(0, 1);
  submit();
  fail(leg(0).id, ErrorKind::kInternal);
  advance(RouterCore::kExcludedForUs - 1);
  EXPECT_EQ(port.opened.size(), 1u);
  advance(300'000);
  ASSERT_EQ(port.opened.size(), 2u);
  token(leg(1).id, 1, true);
  expect_rest();
}

TEST_F(RouterCoreTest, BlamesThePairWhenBlocksDoNotArriveThoughBothAnswer) {
  start(2, 2, {.repeats = {1, 0}});
  submit();
  core->leg_reserved(leg(0).id, "{}", now);
  const WorkerId prefill = leg(1).worker;
  const WorkerId decode = leg(0).worker;
  fail(leg(0).id, ErrorKind::kUnavailable);  // decode: no block came
  ASSERT_EQ(port.opened.size(), 3u);
  EXPECT_NE(leg(2).worker, decode);
  core->leg_reserved(leg(2).id, "{}", now);
  EXPECT_NE(leg(3).worker, prefill);
  token(leg(2).id, 1, true);
  core->leg_done(leg(3).id, "", now);
  port.open.erase(leg(3).id);
  EXPECT_EQ(count("tandem:router_pair_failures_total"), 1);
  for (const WorkerId id : {prefill, decode}) EXPECT_TRUE(core->workers().worker(id).breaker.is_closed());
  expect_rest();
}

// Other models, or other types of KV: told as 501 by one of the two.
TEST_F(RouterCoreTest, TriesOthersWhenTwoWorkersDoNotFitTogether) {
  start(2, 1, {.repeats = {2, 0}});
  const std::shared_ptr<Answer> answer = submit();
  core->leg_reserved(leg(0).id, "{}", now);
  const WorkerId prefill = leg(1).worker;
  fail(leg(1).id, ErrorKind::kUnsupported);
  advance(3 * kSecond);  // decode is taken again once it was left out for a moment
  ASSERT_GE(port.opened.size(), 3u);
  core->leg_reserved(leg(2).id, "{}", now);
  EXPECT_NE(leg(3).worker, prefill);
  token(leg(2).id, 1, true);
  EXPECT_TRUE(answer->finished);
}

TEST_F(RouterCoreTest, SaysThatWorkersDoNotFitTogether) {
  start(1, 1, {.repeats = {0, 0}});
  const std::shared_ptr<Answer> answer = submit();
  core->leg_reserved(leg(0).id, "{}", now);
  fail(leg(1).id, ErrorKind::kUnsupported);
  ASSERT_TRUE(answer->error.has_value());
  EXPECT_EQ(answer->error->kind, ErrorKind::kUnavailable);
  EXPECT_NE(answer->error->message.find("do not fit together"), std::string::npos);
  expect_rest();
}

TEST_F(RouterCoreTest, LeavesOutAWorkerThatKeepsFailingWhileThereAreOthers) {
  start(0, 2,
        {.registry = {PolicyKind::kRoundRobin, PolicyKind::kRoundRobin, {.failures_to_open = 2}}, .repeats = {0, 0}});
  for (int i = 0; i < 4; ++i) {
    submit();
    leg(port.opened.size() - 1).worker == decodes[0] ? fail(port.opened.back().id, ErrorKind::kInternal)
                                                     : token(port.opened.back().id, 1, true);
  }
  EXPECT_FALSE(core->workers().worker(decodes[0]).breaker.is_closed());
  for (int i = 0; i < 4; ++i) {
    submit();
    EXPECT_EQ(port.opened.back().worker, decodes[1]);
    token(port.opened.back().id, 1, true);
  }
  core->drain_worker(decodes[1]);
  submit();  // nobody else is there: better the sick one than none
  EXPECT_EQ(port.opened.back().worker, decodes[0]);
  token(port.opened.back().id, 1, true);
  EXPECT_TRUE(core->workers().worker(decodes[0]).breaker.is_closed());
  expect_rest();
}

TEST_F(RouterCoreTest, QueuesInOrderAndRefusesWhatTheQueueCannotHold) {
  start(0, 1, {.max_requests = 1, .queue_size = 2, .queue_timeout_us = 5 * kSecond});
  const auto first = submit();
  const auto second = submit();
  const auto third = submit();
  const auto fourth = submit();
  ASSERT_TRUE(fourth->error.has_value());
  EXPECT_EQ(fourth->error->kind, ErrorKind::kResourceExhausted);
  EXPECT_EQ(port.opened.size(), 1u);
  token(leg(0).id, 1, true);
  ASSERT_EQ(port.opened.size(), 2u);
  token(leg(1).id, 2, true);
  EXPECT_EQ(second->tokens, std::vector<TokenId>{2});
  const auto fifth = submit();
  advance(5 * kSecond);
  ASSERT_TRUE(fifth->error.has_value());
  EXPECT_EQ(fifth->error->kind, ErrorKind::kUnavailable);
  EXPECT_FALSE(third->error.has_value());
  EXPECT_TRUE(core->cancel(RequestId(3), now));
  expect_rest();
}

TEST_F(RouterCoreTest, EndsWhatItsLegsDoNotEnd) {
  start(1, 1);
  engine::TokenRequest request;
  request.prompt = {1};
  request.deadline_us = now + kSecond;
  const auto answer = submit(std::move(request));
  core->leg_reserved(leg(0).id, "{}", now);
  advance(kSecond + RouterCore::kDeadlineSlackUs);
  ASSERT_TRUE(answer->error.has_value());
  EXPECT_EQ(answer->error->message, "the request's deadline passed while the prefill worker computed the prompt");
  EXPECT_EQ(port.cancelled, (std::vector<LegId>{leg(0).id, leg(1).id}));
  expect_rest();
}

TEST_F(RouterCoreTest, DecodeComputesThePromptWhereThatIsBetter) {
  start(1, 1, {.local_prompt_tokens = 2});
  const auto runs_locally = [&](engine::TokenRequest request) {
    submit(std::move(request));
    const bool local = port.opened.back().transfer.empty();
    core->cancel(last_id, now);
    return local;
  };
  engine::TokenRequest request;
  request.prompt = {1, 2, 3};
  request.sampling.max_tokens = 5;
  EXPECT_FALSE(runs_locally(request));
  request.sampling.max_tokens = 1;
  EXPECT_TRUE(runs_locally(request));
  request.sampling.max_tokens = 5;
  request.is_one_of_several = true;
  EXPECT_TRUE(runs_locally(request));
  request.is_one_of_several = false;
  request.prompt = {1, 2};
  EXPECT_TRUE(runs_locally(request));
  request.prompt = {1, 2, 3};
  core->probe_result(prefills[0], false, now);
  core->probe_result(prefills[0], false, now);
  EXPECT_TRUE(runs_locally(request));
  for (const char* reason : {"one_token", "several_choices", "short_prompt", "no_prefill_worker"}) {
    EXPECT_EQ(count(fmt::format("tandem:router_local_prompts_total{{reason=\"{}\"}}", reason)), 1) << reason;
  }
  expect_rest();
}

TEST_F(RouterCoreTest, AWorkerDoesNotSendBlocksToItself) {
  start(0, 0);
  for (const Role role : {Role::kPrefill, Role::kDecode}) {
    core->probe_result(core->add_worker(role, "both").value(), true, now);
  }
  submit();
  EXPECT_EQ(leg(0).role, Role::kDecode);
  EXPECT_EQ(leg(0).transfer, "");
  EXPECT_EQ(count("tandem:router_local_prompts_total{reason=\"same_worker\"}"), 1);
  token(leg(0).id, 1, true);
  expect_rest();
}

TEST_F(RouterCoreTest, DecodeComputesAPromptWhoseTransferHasNoRoom) {
  start(1, 1, {.repeats = {.retries = 0}});
  const auto answer = submit();
  port.open.erase(port.opened.back().id);
  Error no_room = make_error(ErrorKind::kTooLarge, "too many blocks");
  no_room.code = engine::kNoRoom;
  core->leg_failed(port.opened.back().id, {no_room}, now);
  EXPECT_EQ(port.opened.back().transfer, "");
  token(port.opened.back().id, 1, true);
  EXPECT_TRUE(answer->finished);
  EXPECT_EQ(count("tandem:router_local_prompts_total{reason=\"no_room\"}"), 1);
  EXPECT_EQ(core->num_retries(), 0);
  EXPECT_EQ(after(decodes[0], "too_large", "fallen_back"), 1);
  expect_rest();
}

TEST_F(RouterCoreTest, EnforcedDisaggregationNamesTheMissingRoom) {
  start(1, 1, {.enforce_disagg = true});
  const auto answer = submit();
  Error no_room = make_error(ErrorKind::kTooLarge, "too many blocks");
  no_room.code = engine::kNoRoom;
  port.open.erase(leg(0).id);
  core->leg_failed(leg(0).id, {no_room}, now);
  ASSERT_TRUE(answer->error.has_value());
  EXPECT_EQ(answer->error->message, "too many blocks");
  expect_rest();
}

TEST_F(RouterCoreTest, ARequestGoesToThePrefillWorkerThatItNames) {
  start(2, 1);
  const WorkerId apart = core->add_worker(Role::kPrefill, "http://10.0.0.1:8100").value();
  core->set_only_named(apart);
  core->probe_result(apart, true, now);
  const auto ask = [this](const std::string& prefiller) {
    engine::TokenRequest request;
    request.prompt = {1, 2, 3};
    request.sampling.max_tokens = 1;  // would be computed by decode
    request.prefiller = prefiller;
    return submit(std::move(request));
  };
  for (const auto& [name, worker] : {std::pair<std::string, WorkerId>("10.0.0.1:8100", apart), {"p1", prefills[1]}}) {
    ask(name);
    core->leg_reserved(port.opened.back().id, "address", now);
    EXPECT_EQ(port.opened.back().role, Role::kPrefill);
    EXPECT_EQ(port.opened.back().worker, worker);
    core->cancel(last_id, now);
  }
  for (int i = 0; i < 10; ++i) {
    submit();
    core->leg_reserved(port.opened.back().id, "address", now);
    EXPECT_NE(port.opened.back().worker, apart);
    core->cancel(last_id, now);
  }
  const auto unknown = ask("d0");
  ASSERT_TRUE(unknown->error.has_value());
  EXPECT_EQ(unknown->error->kind, ErrorKind::kInvalidArgument);
  EXPECT_NE(unknown->error->message.find("'d0'"), std::string::npos);
  for (int i = 0; i < 2; ++i) core->probe_result(apart, false, now);
  now += 60 * kSecond;
  const auto away = ask("10.0.0.1:8100");
  advance(60 * kSecond);
  ASSERT_TRUE(away->error.has_value());
  EXPECT_EQ(away->error->kind, ErrorKind::kUnavailable);
  expect_rest();
}

TEST_F(RouterCoreTest, AWorkerThatDrainsKeepsWhatItHas) {
  start(0, 2);
  const auto answer = submit();
  const WorkerId first = leg(0).worker;
  for (int i = 0; i < 100; ++i) {
    now += kSecond;
    core->probe_result(first, false, now, /*has_answered=*/true);
  }
  submit();
  EXPECT_NE(leg(1).worker, first);
  EXPECT_TRUE(port.cancelled.empty());
  token(leg(0).id, 1, true);
  token(leg(1).id, 1, true);
  EXPECT_TRUE(answer->finished);
  expect_rest();
}

TEST_F(RouterCoreTest, CountsWhatBecameOfFailuresByWorkerAndCause) {
  start(0, 2, {.repeats = {.retries = 1, .migrations = 1}});
  submit();
  const WorkerId first = leg(0).worker, second = first == decodes[0] ? decodes[1] : decodes[0];
  fail(leg(0).id, ErrorKind::kUnavailable);
  EXPECT_EQ(after(first, "unavailable", "retried"), 1);
  token(leg(1).id, 1);
  now += 10 * kSecond;
  fail(leg(1).id, ErrorKind::kDataLoss);
  EXPECT_EQ(after(second, "data_loss", "migrated"), 1);
  fail(leg(2).id, ErrorKind::kInternal);
  EXPECT_EQ(after(leg(2).worker, "internal", "failed"), 1);
  EXPECT_EQ(port.opened.size(), 3U);
  expect_rest();
}

TEST_F(RouterCoreTest, UncachedTokensAreWhatCountsAsShort) {
  start(1, 1, {.local_prompt_tokens = 8});
  engine::TokenRequest request;
  for (TokenId i = 0; i < 40; ++i) request.prompt.push_back(i);
  request.sampling.max_tokens = 5;
  submit(request);
  EXPECT_FALSE(port.opened.back().transfer.empty());
  core->cancel(last_id, now);
  submit(request);  // 32 of the 40 tokens were sent there before
  EXPECT_TRUE(port.opened.back().transfer.empty());
  core->cancel(last_id, now);
  expect_rest();
}

TEST_F(RouterCoreTest, EnforcedDisaggregationHasNoExceptions) {
  start(1, 1, {.enforce_disagg = true, .local_prompt_tokens = 100, .rescue_us = 0});
  submit(1);
  EXPECT_FALSE(port.opened.back().transfer.empty());
  core->cancel(last_id, now);
  core->probe_result(prefills[0], false, now);
  core->probe_result(prefills[0], false, now);
  EXPECT_FALSE(core->is_ready());
  const auto answer = submit();
  ASSERT_TRUE(answer->error.has_value());
  EXPECT_EQ(answer->error->message, "no prefill worker is available (1 known); try again later");
  expect_rest();
}

TEST_F(RouterCoreTest, ADrainedWorkerEndsWhatItHasAndIsGone) {
  start(0, 2, {.registry = {PolicyKind::kRoundRobin, PolicyKind::kRoundRobin}});
  const auto answer = submit();
  const WorkerId first = leg(0).worker;
  core->drain_worker(first);
  for (int i = 0; i < 3; ++i) {
    submit();
    EXPECT_NE(port.opened.back().worker, first);
    token(port.opened.back().id, 1, true);
  }
  EXPECT_EQ(core->workers().worker(first).membership, Membership::kDraining);
  token(leg(0).id, 1, true);
  EXPECT_TRUE(answer->finished);
  EXPECT_EQ(core->workers().worker(first).membership, Membership::kRemoved);
  expect_rest();
}

TEST_F(RouterCoreTest, AFrozenWorkerIsGivenUpAndItsRequestsMove) {
  start(0, 2, {.unresponsive_us = 2 * kSecond});
  const auto answer = submit();
  token(leg(0).id, 11);
  for (int i = 0; i <= 4; ++i) {
    core->probe_result(leg(0).worker, false, now);
    EXPECT_EQ(port.opened.size(), i < 4 ? 1u : 2u);
    now += kSecond / 2;
  }
  ASSERT_EQ(port.opened.size(), 2u);
  EXPECT_EQ(port.cancelled, std::vector<LegId>{leg(0).id});
  token(leg(1).id, 12, true);
  EXPECT_EQ(answer->tokens, (std::vector<TokenId>{11, 12}));
  expect_rest();
}

// In each of these the attempt of a pull ends before decode has shown that it read what prefill published.
TEST_F(RouterCoreTest, ReleasesAPublicationThatNobodyComesFor) {
  using End = std::function<void()>;
  start(2, 2, {.pull = true, .repeats = {1, 0}, .rescue_us = kSecond, .unresponsive_us = kSecond});
  const auto decode_leg = [this]() -> const Opened& { return port.opened.back(); };
  const std::vector<std::pair<const char*, End>> ends = {
      {"decode's worker refuses the connection", [&] { fail(decode_leg().id, ErrorKind::kUnavailable, false); }},
      {"decode's worker died", [&] { fail(decode_leg().id, ErrorKind::kUnavailable, false, true); }},
      {"decode's fault", [&] { fail(decode_leg().id, ErrorKind::kInternal); }},
      {"decode is full", [&] { fail(decode_leg().id, ErrorKind::kResourceExhausted); }},
      {"the client has left", [&] { core->cancel(last_id, now); }},
      {"decode's deadline", [&] { fail(decode_leg().id, ErrorKind::kDeadlineExceeded); }},
      {"nobody keeps the deadline", [&] { advance(601 * kSecond); }},
      {"decode is frozen",
       [&] {
         const WorkerId frozen = decode_leg().worker;
         for (int i = 0; i < 8; ++i, now += kSecond / 4) core->probe_result(frozen, false, now);
         for (int i = 0; i < 2; ++i) core->probe_result(frozen, true, now);
       }},
  };
  int64_t num_released = 0;
  for (const auto& [name, end] : ends) {
    SCOPED_TRACE(name);
    const auto answer = submit();
    ASSERT_EQ(port.opened.back().role, Role::kPrefill);
    EXPECT_TRUE(port.opened.back().publishes);
    const WorkerId prefill = port.opened.back().worker;
    const std::string published = fmt::format(R"({{"remote_request_id":"{}"}})", name);
    port.open.erase(port.opened.back().id);
    core->leg_done(port.opened.back().id, published, now);
    ASSERT_EQ(port.opened.back().role, Role::kDecode);
    EXPECT_FALSE(port.opened.back().publishes);
    EXPECT_EQ(std::ssize(port.released), num_released);
    end();
    ASSERT_EQ(std::ssize(port.released), ++num_released);
    EXPECT_EQ(port.released.back(), std::pair(prefill, published));
    core->cancel(last_id, now);  // what was tried again
    advance(3 * kSecond);        // for workers that failed
    EXPECT_EQ(std::ssize(port.released), num_released);
    expect_rest();
  }
  EXPECT_EQ(count("tandem:router_released_publications_total"), num_released);
}

TEST_F(RouterCoreTest, DoesNotReleaseWhatDecodeHasRead) {
  start(1, 2, {.pull = true});
  const auto answer = submit();
  port.open.erase(leg(0).id);
  core->leg_done(leg(0).id, R"({"remote_request_id":"a"})", now);
  token(leg(1).id, 11);
  fail(leg(1).id, ErrorKind::kUnavailable, false, true);
  token(leg(2).id, 12, true);
  EXPECT_TRUE(answer->finished);
  EXPECT_TRUE(port.released.empty());
  expect_rest();
}

// The leg is cancelled, and its answer was under way.
TEST_F(RouterCoreTest, ReleasesWhatACancelledLegHasPublished) {
  start(1, 1, {.pull = true});
  submit();
  core->cancel(last_id, now);
  EXPECT_EQ(port.cancelled, std::vector<LegId>{leg(0).id});
  EXPECT_TRUE(port.released.empty());
  core->publication_unwanted(leg(0).worker, "address");
  EXPECT_EQ(port.released.back(), std::pair(leg(0).worker, std::string("address")));
  EXPECT_EQ(count("tandem:router_released_publications_total"), 1);
  expect_rest();
}

// A rank group's endpoint does not know what becomes of a publication, but its rank may publish after a cancel.
TEST_F(RouterCoreTest, ALegOfAnotherRoutersPullPublishes) {
  start(0, 1, {.passes_transfers = true});
  const auto publishes = [this](bool do_remote_decode, transfer::TransferMode mode) {
    engine::TokenRequest request;
    request.prompt = {1, 2, 3};
    request.kv_transfer.emplace().do_remote_decode = do_remote_decode;
    request.kv_transfer->mode = mode;
    submit(std::move(request));
    const bool result = port.opened.back().publishes;
    core->cancel(last_id, now);
    return result;
  };
  EXPECT_TRUE(publishes(true, transfer::TransferMode::kPull));
  EXPECT_FALSE(publishes(true, transfer::TransferMode::kPush));
  EXPECT_FALSE(publishes(false, transfer::TransferMode::kPull));
  EXPECT_TRUE(port.released.empty());
  expect_rest();
}

TEST_F(RouterCoreTest, RepeatsAreBoundedByABudget) {
  start(0, 2, {.repeats = {1, 0}, .retry_share = 0});
  int failed = 0;
  for (int i = 0; i < 150; ++i) {
    const auto answer = submit();
    fail(port.opened.back().id, ErrorKind::kUnavailable);
    if (answer->error) {
      ++failed;
    } else {
      token(port.opened.back().id, 1, true);
    }
  }
  EXPECT_EQ(core->num_retries(), 100);
  EXPECT_EQ(failed, 50);
  expect_rest();
}

// Any order of events leaves nothing behind, and each request ends at most once (the sink checks).
TEST_F(RouterCoreTest, NothingIsLeftAfterAnyOrderOfEvents) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  start(2, 2, {.max_requests = 20, .queue_size = 10, .rescue_us = kSecond, .request_timeout_us = 20 * kSecond});
  constexpr ErrorKind kKinds[] = {ErrorKind::kUnavailable, ErrorKind::kInternal, ErrorKind::kInvalidArgument,
                                  ErrorKind::kResourceExhausted, ErrorKind::kDeadlineExceeded};
  for (int step = 0; step < 20'000; ++step) {
    now += static_cast<int64_t>(random() % 20'000);
    core->tick(now);
    switch (random() % 8) {
      case 0:
        submit(static_cast<int64_t>(1 + random() % 4));
        break;
      case 1:
        core->cancel(RequestId(1 + random() % (next_id + 1)), now);
        break;
      case 2: {
        const WorkerId id(static_cast<int32_t>(random() % 4));
        core->probe_result(id, random() % 4 != 0, now);
        break;
      }
      default: {
        if (port.open.empty()) break;
        auto chosen = port.open.begin();
        std::advance(chosen, static_cast<int64_t>(random() % port.open.size()));
        const LegId id = chosen->first;
        const bool is_prefill = chosen->second.value < 2;
        const size_t what = random() % 6;
        if (what == 0) {
          fail(id, kKinds[random() % std::size(kKinds)], random() % 2 == 0, random() % 8 == 0);
        } else if (is_prefill) {
          port.open.erase(id);
          core->leg_done(id, "", now);
        } else if (what == 1) {
          core->leg_reserved(id, "{}", now);
        } else {
          token(id, 1, what == 2);
        }
      }
    }
  }
  advance(60 * kSecond);
  expect_rest();
  EXPECT_GT(core->num_retries(), 0);
}

}  // namespace
}  // namespace tandem::router
