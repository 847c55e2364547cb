#include "src/router/two_legs.h"

#include <gtest/gtest.h>

#include <functional>

namespace tandem::router {
namespace {

constexpr WorkerId kDecode0{0}, kDecode1{1}, kPrefill0{10}, kPrefill1{11};
constexpr LegMode kPlain = LegMode::kPlain, kPush = LegMode::kPush, kPull = LegMode::kPull;
const char* const kAddress = R"({"do_remote_decode":true,"remote_host":"h","vendor_field":[1]})";

// One word per action: pick, decode, prefill, cancel, release, emit.
std::string describe(const LegActions& actions) {
  std::string out;
  for (const LegAction& action : actions) {
    if (!out.empty()) out += ' ';
    if (const PickWorkers* pick = std::get_if<PickWorkers>(&action)) out += pick->resumes ? "resume" : "pick";
    if (const StartDecode* start = std::get_if<StartDecode>(&action)) out += fmt::format("decode@{}", start->worker);
    if (const StartPrefill* start = std::get_if<StartPrefill>(&action)) out += fmt::format("prefill@{}", start->worker);
    if (std::get_if<CancelDecode>(&action)) out += "cancel-decode";
    if (std::get_if<CancelPrefill>(&action)) out += "cancel-prefill";
    if (const ReleasePublication* release = std::get_if<ReleasePublication>(&action)) {
      EXPECT_EQ(release->transfer, kAddress);
      out += fmt::format("release@{}", release->worker);
    }
    if (const EmitEvent* emit = std::get_if<EmitEvent>(&action)) {
      const engine::TokenEvent& event = emit->event;
      out += event.error    ? fmt::format("error:{}", error_kind_name(event.error->kind))
             : event.finish ? "finish"
                            : "tokens";
    }
  }
  return out;
}

engine::TokenEvent tokens_event(bool finish = false) {
  engine::TokenEvent event;
  event.tokens.push_back({.token = 5, .logprob = 0, .top_logprobs = {}});
  if (finish) event.finish = engine::FinishReason::kLength;
  return event;
}

LegFault fault(ErrorKind kind) { return {make_error(kind, "it broke")}; }

TEST(TwoLegs, PlainStreamsFromDecode) {
  TwoLegs legs({.retries = 2});
  EXPECT_EQ(describe(legs.start()), "pick");
  const LegActions started = legs.picked({kPlain, kDecode0});
  EXPECT_EQ(describe(started), "decode@0");
  EXPECT_EQ(std::get<StartDecode>(started[0]).transfer, "");
  EXPECT_EQ(describe(legs.decode_event(tokens_event())), "tokens");
  EXPECT_EQ(describe(legs.decode_event(tokens_event(true))), "finish");
  EXPECT_TRUE(legs.is_closed());
  EXPECT_EQ(describe(legs.decode_event(tokens_event())), "");
}

TEST(TwoLegs, PushHandsDecodesAddressToPrefillVerbatim) {
  TwoLegs legs({.retries = 2});
  legs.start();
  const LegActions started = legs.picked({kPush, kDecode0, kPrefill0});
  EXPECT_EQ(describe(started), "decode@0");
  EXPECT_NE(std::get<StartDecode>(started[0]).transfer.find(R"("do_remote_prefill":true)"), std::string::npos);
  const LegActions reserved = legs.decode_reserved(kAddress);
  EXPECT_EQ(describe(reserved), "prefill@10");
  EXPECT_EQ(std::get<StartPrefill>(reserved[0]).transfer, kAddress);
  EXPECT_EQ(describe(legs.decode_event(tokens_event())), "tokens");
  EXPECT_EQ(describe(legs.decode_event(tokens_event(true))), "finish");
  EXPECT_TRUE(legs.is_answered());
  EXPECT_FALSE(legs.is_closed());  // prefill's own answer is still on the way
  EXPECT_EQ(describe(legs.prefill_done("")), "");
  EXPECT_TRUE(legs.is_closed());
}

TEST(TwoLegs, PullHandsPrefillsAddressToDecodeVerbatim) {
  TwoLegs legs({.retries = 2});
  legs.start();
  const LegActions started = legs.picked({kPull, kDecode0, kPrefill0});
  EXPECT_EQ(describe(started), "prefill@10");
  EXPECT_NE(std::get<StartPrefill>(started[0]).transfer.find(R"("remote_engine_id":null)"), std::string::npos);
  const LegActions prefilled = legs.prefill_done(kAddress);
  EXPECT_EQ(describe(prefilled), "decode@0");
  EXPECT_EQ(std::get<StartDecode>(prefilled[0]).transfer, kAddress);
  EXPECT_EQ(describe(legs.decode_event(tokens_event(true))), "finish");
  EXPECT_TRUE(legs.is_closed());
}

// Brings a fresh request to one point of its life.
enum class Point { kDecodeAsked, kPrefillAsked, kDecodeFetching, kStreaming, kStreamingPrefillOpen };

TwoLegs request_at(LegMode mode, Point point, int max_retries) {
  TwoLegs legs({.retries = max_retries});
  legs.start();
  legs.picked({mode, kDecode0, mode == LegMode::kPlain ? std::nullopt : std::optional<WorkerId>(kPrefill0)});
  if (point == Point::kDecodeAsked) return legs;
  if (mode == LegMode::kPush) legs.decode_reserved(kAddress);
  if (point == Point::kPrefillAsked) return legs;
  if (mode == LegMode::kPull) legs.prefill_done(kAddress);
  if (point == Point::kDecodeFetching) return legs;
  if (mode == LegMode::kPush && point == Point::kStreaming) legs.prefill_done("");
  legs.decode_event(tokens_event());
  return legs;
}

// Fault x leg x point: what the client gets, and what the other leg is told.
struct FaultCase {
  LegMode mode;
  Point point;
  Role failing;
  ErrorKind kind;
  const char* with_retry;     // actions while further attempts are allowed
  const char* without_retry;  // and when none is left
};

constexpr Role P = Role::kPrefill, D = Role::kDecode;

const FaultCase kFaultCases[] = {
    // decode fails alone
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kUnavailable, "pick", "error:unavailable"},
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kInternal, "pick", "error:internal"},
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kDataLoss, "pick", "error:data_loss"},
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kInvalidArgument, "error:invalid_argument", "error:invalid_argument"},
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kNotFound, "error:not_found", "error:not_found"},
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kResourceExhausted, "error:resource_exhausted",
     "error:resource_exhausted"},
    {kPlain, Point::kDecodeAsked, D, ErrorKind::kDeadlineExceeded, "error:deadline_exceeded",
     "error:deadline_exceeded"},
    {kPlain, Point::kStreaming, D, ErrorKind::kUnavailable, "error:unavailable", "error:unavailable"},
    // push: decode fails before it reserved, while prefill computes, in the stream
    {kPush, Point::kDecodeAsked, D, ErrorKind::kUnavailable, "pick", "error:unavailable"},
    {kPush, Point::kDecodeAsked, D, ErrorKind::kResourceExhausted, "error:resource_exhausted",
     "error:resource_exhausted"},
    {kPush, Point::kPrefillAsked, D, ErrorKind::kUnavailable, "cancel-prefill pick",
     "cancel-prefill error:unavailable"},
    {kPush, Point::kPrefillAsked, D, ErrorKind::kDeadlineExceeded, "cancel-prefill error:deadline_exceeded",
     "cancel-prefill error:deadline_exceeded"},
    {kPush, Point::kStreamingPrefillOpen, D, ErrorKind::kUnavailable, "cancel-prefill error:unavailable",
     "cancel-prefill error:unavailable"},
    {kPush, Point::kStreaming, D, ErrorKind::kInternal, "error:internal", "error:internal"},
    // push: prefill fails
    {kPush, Point::kPrefillAsked, P, ErrorKind::kUnavailable, "cancel-decode pick", "cancel-decode error:unavailable"},
    {kPush, Point::kPrefillAsked, P, ErrorKind::kInternal, "cancel-decode pick", "cancel-decode error:internal"},
    {kPush, Point::kPrefillAsked, P, ErrorKind::kInvalidArgument, "cancel-decode error:invalid_argument",
     "cancel-decode error:invalid_argument"},
    {kPush, Point::kPrefillAsked, P, ErrorKind::kDeadlineExceeded, "cancel-decode error:deadline_exceeded",
     "cancel-decode error:deadline_exceeded"},
    {kPush, Point::kStreamingPrefillOpen, P, ErrorKind::kUnavailable, "", ""},
    // pull: prefill fails, then decode at each point
    {kPull, Point::kDecodeAsked, P, ErrorKind::kUnavailable, "pick", "error:unavailable"},
    {kPull, Point::kDecodeAsked, P, ErrorKind::kInvalidArgument, "error:invalid_argument", "error:invalid_argument"},
    {kPull, Point::kDecodeFetching, D, ErrorKind::kUnavailable, "release@10 pick", "release@10 error:unavailable"},
    {kPull, Point::kDecodeFetching, D, ErrorKind::kResourceExhausted, "release@10 error:resource_exhausted",
     "release@10 error:resource_exhausted"},
    {kPull, Point::kDecodeFetching, D, ErrorKind::kDeadlineExceeded, "release@10 error:deadline_exceeded",
     "release@10 error:deadline_exceeded"},
    {kPull, Point::kStreaming, D, ErrorKind::kUnavailable, "error:unavailable", "error:unavailable"},
};

TEST(TwoLegs, FaultTable) {
  for (const FaultCase& c : kFaultCases) {
    for (const int max_retries : {2, 0}) {
      SCOPED_TRACE(fmt::format("mode {} point {} failing {} kind {} retries {}", static_cast<int>(c.mode),
                               static_cast<int>(c.point), role_name(c.failing), error_kind_name(c.kind), max_retries));
      TwoLegs legs = request_at(c.mode, c.point, max_retries);
      const LegActions actions =
          c.failing == P ? legs.prefill_failed(fault(c.kind)) : legs.decode_failed(fault(c.kind));
      EXPECT_EQ(describe(actions), max_retries > 0 ? c.with_retry : c.without_retry);
      const bool retried = describe(actions).find("pick") != std::string::npos;
      const bool failed = describe(actions).find("error") != std::string::npos;
      EXPECT_EQ(legs.is_answered(), failed);
      EXPECT_TRUE(retried || failed || describe(actions).empty());
      // Nothing follows a terminal event, whatever the legs still say.
      if (failed) {
        EXPECT_TRUE(legs.is_closed());
        EXPECT_EQ(describe(legs.decode_event(tokens_event())), "");
        EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kInternal))), "");
        EXPECT_EQ(describe(legs.prefill_failed(fault(ErrorKind::kInternal))), "");
        EXPECT_EQ(describe(legs.prefill_done(kAddress)), "");
        EXPECT_EQ(describe(legs.cancel()), "");
      }
    }
  }
}

TEST(TwoLegs, CancelClosesBothLegsAtEveryPoint) {
  struct Case {
    LegMode mode;
    Point point;
    const char* actions;
  };
  for (const Case& c : {Case{kPlain, Point::kDecodeAsked, "cancel-decode"},
                        {kPlain, Point::kStreaming, "cancel-decode"},
                        {kPush, Point::kDecodeAsked, "cancel-decode"},
                        {kPush, Point::kPrefillAsked, "cancel-decode cancel-prefill"},
                        {kPush, Point::kStreamingPrefillOpen, "cancel-decode cancel-prefill"},
                        {kPush, Point::kStreaming, "cancel-decode"},
                        {kPull, Point::kDecodeAsked, "cancel-prefill"},
                        {kPull, Point::kDecodeFetching, "cancel-decode release@10"},
                        {kPull, Point::kStreaming, "cancel-decode"}}) {
    TwoLegs legs = request_at(c.mode, c.point, 2);
    EXPECT_EQ(describe(legs.cancel()), c.actions);
    EXPECT_TRUE(legs.is_closed());
    EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kUnavailable))), "");
    EXPECT_EQ(describe(legs.prefill_failed(fault(ErrorKind::kUnavailable))), "");
  }
}

TEST(TwoLegs, RetriesOnOtherWorkersWithNewHandlesAtMostTwice) {
  TwoLegs legs({.retries = 2});
  legs.start();
  legs.picked({kPush, kDecode0, kPrefill0});
  legs.decode_reserved("first");
  EXPECT_EQ(describe(legs.prefill_failed(fault(ErrorKind::kUnavailable))), "cancel-decode pick");
  EXPECT_EQ(describe(legs.picked({kPush, kDecode0, kPrefill1})), "decode@0");
  const LegActions reserved = legs.decode_reserved("second");
  EXPECT_EQ(std::get<StartPrefill>(reserved[0]).transfer, "second");
  EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kInternal))), "cancel-prefill pick");
  legs.picked({kPush, kDecode1, kPrefill1});
  legs.decode_reserved("third");
  EXPECT_EQ(describe(legs.prefill_failed(fault(ErrorKind::kUnavailable))), "cancel-decode error:unavailable");
  EXPECT_EQ(legs.attempts(), 3);
}

// A worker without room for the transfer has not failed: no repeat is used up, but it helps once only.
TEST(TwoLegs, GoesWithoutATransferWhereThereIsNoRoomForOne) {
  TwoLegs legs({.retries = 0});
  LegFault no_room = fault(ErrorKind::kTooLarge);
  no_room.error.code = engine::kNoRoom;
  legs.start();
  legs.picked({kPush, kDecode0, kPrefill0});
  legs.decode_reserved("address");
  const LegActions actions = legs.prefill_failed(no_room);
  EXPECT_EQ(describe(actions), "cancel-decode pick");
  EXPECT_TRUE(std::get<PickWorkers>(actions[1]).without_transfer);
  EXPECT_EQ(describe(legs.picked({kPlain, kDecode0, {}})), "decode@0");
  EXPECT_EQ(describe(legs.decode_failed(no_room)), "error:too_large");
}

// Each attempt has a publication of its own, and only that of the one that failed is released.
TEST(TwoLegs, ReleasesWhatEachFailedAttemptPublished) {
  TwoLegs legs({.retries = 2, .migrations = 1});
  legs.start();
  legs.picked({kPull, kDecode0, kPrefill0});
  legs.prefill_done(kAddress);
  EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kUnavailable))), "release@10 pick");
  EXPECT_EQ(describe(legs.picked({kPull, kDecode1, kPrefill1})), "prefill@11");
  EXPECT_EQ(describe(legs.prefill_failed(fault(ErrorKind::kUnavailable))), "pick");  // it has published nothing
  legs.picked({kPull, kDecode1, kPrefill1});
  legs.prefill_done(kAddress);
  EXPECT_EQ(describe(legs.decode_event(tokens_event())), "tokens");  // it has been read
  EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kUnavailable))), "resume");
  EXPECT_EQ(describe(legs.none_available(fault(ErrorKind::kUnavailable).error)), "error:unavailable");
}

TEST(TwoLegs, ReleasesWhatDecodeHasNoRoomFor) {
  TwoLegs legs({.retries = 0});
  LegFault no_room = fault(ErrorKind::kTooLarge);
  no_room.error.code = engine::kNoRoom;
  legs.start();
  legs.picked({kPull, kDecode0, kPrefill0});
  legs.prefill_done(kAddress);
  EXPECT_EQ(describe(legs.decode_failed(no_room)), "release@10 pick");
  EXPECT_EQ(describe(legs.picked({kPlain, kDecode0, {}})), "decode@0");
  EXPECT_EQ(describe(legs.cancel()), "cancel-decode");
}

TEST(TwoLegs, GoesOnBehindWhatWasEmitted) {
  TwoLegs legs({.retries = 0, .migrations = 2});
  legs.start();
  legs.picked({kPush, kDecode0, kPrefill0});
  legs.decode_reserved(kAddress);
  EXPECT_EQ(describe(legs.decode_event(tokens_event())), "tokens");
  // Prefill's own answer is still on the way; it is of no use to anybody now.
  EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kUnavailable))), "cancel-prefill resume");
  EXPECT_EQ(describe(legs.picked({kPlain, kDecode1})), "decode@1");
  EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kUnavailable))), "resume");
  legs.picked({kPlain, kDecode0});
  EXPECT_EQ(describe(legs.decode_event(tokens_event())), "tokens");
  EXPECT_EQ(describe(legs.decode_failed(fault(ErrorKind::kUnavailable))), "error:unavailable");
  EXPECT_TRUE(legs.is_closed());
}

TEST(TwoLegs, MigratesOnlyWhatAWorkerBroke) {
  for (const ErrorKind kind : {ErrorKind::kInvalidArgument, ErrorKind::kDeadlineExceeded, ErrorKind::kAborted}) {
    TwoLegs legs({.retries = 2, .migrations = 2});
    legs.start();
    legs.picked({kPlain, kDecode0});
    legs.decode_event(tokens_event());
    EXPECT_EQ(describe(legs.decode_failed(fault(kind))), fmt::format("error:{}", error_kind_name(kind)));
  }
}

TEST(TwoLegs, DoesNotTryARequestAgainThatTwoWorkersDiedOf) {
  const LegFault death{make_error(ErrorKind::kUnavailable, "connection lost"), false, true};
  TwoLegs legs({.retries = 5, .migrations = 5});
  legs.start();
  legs.picked({kPush, kDecode0, kPrefill0});
  legs.decode_reserved(kAddress);
  EXPECT_EQ(describe(legs.prefill_failed(death)), "cancel-decode pick");
  legs.picked({kPush, kDecode0, kPrefill1});
  const LegActions actions = legs.decode_failed(death);
  EXPECT_EQ(describe(actions), "error:unavailable");
  EXPECT_EQ(std::get<EmitEvent>(actions.back()).event.error->message,
            "2 workers in a row went away with this request in their hands; it is not tried again");
}

TEST(TwoLegs, DoesNotBlameARequestThatGetsFurtherEachTime) {
  const LegFault death{make_error(ErrorKind::kUnavailable, "connection lost"), false, true};
  TwoLegs legs({.retries = 5, .migrations = 5});
  legs.start();
  legs.picked({kPlain, kDecode0});
  EXPECT_EQ(describe(legs.decode_failed(death)), "pick");
  for (int i = 0; i < 3; ++i) {
    legs.picked({kPlain, kDecode1});
    EXPECT_EQ(describe(legs.decode_event(tokens_event())), "tokens");
    EXPECT_EQ(describe(legs.decode_failed(death)), "resume");
  }
  legs.picked({kPlain, kDecode0});
  EXPECT_EQ(describe(legs.decode_failed(death)), "error:unavailable");
}

TEST(TwoLegs, EndsWhatIsLeftWhenTheDeadlineHasPassed) {
  TwoLegs both = request_at(kPush, Point::kPrefillAsked, 2);
  EXPECT_EQ(describe(both.deadline_passed()), "cancel-decode cancel-prefill error:deadline_exceeded");
  EXPECT_TRUE(both.is_closed());
  TwoLegs alone = request_at(kPull, Point::kDecodeAsked, 2);
  EXPECT_EQ(describe(alone.deadline_passed()), "cancel-prefill error:deadline_exceeded");
  TwoLegs fetching = request_at(kPull, Point::kDecodeFetching, 2);
  EXPECT_EQ(describe(fetching.deadline_passed()), "cancel-decode release@10 error:deadline_exceeded");
  EXPECT_EQ(describe(fetching.deadline_passed()), "");
  TwoLegs answered = request_at(kPush, Point::kStreamingPrefillOpen, 2);
  answered.decode_event(tokens_event(true));
  EXPECT_EQ(describe(answered.deadline_passed()), "cancel-prefill");
  EXPECT_TRUE(answered.is_closed());
}

TEST(TwoLegs, ReportsTheFaultOfTheAttemptWhenNobodyElseIsLeft) {
  TwoLegs fresh({.retries = 2});
  fresh.start();
  EXPECT_EQ(describe(fresh.none_available(fault(ErrorKind::kUnavailable).error)), "error:unavailable");
  EXPECT_TRUE(fresh.is_closed());

  TwoLegs failed = request_at(LegMode::kPush, Point::kPrefillAsked, 2);
  failed.prefill_failed({make_error(ErrorKind::kInternal, "out of memory")});
  const LegActions actions = failed.none_available(fault(ErrorKind::kUnavailable).error);
  EXPECT_EQ(std::get<EmitEvent>(actions.at(0)).event.error->message, "out of memory");
}

TEST(TwoLegs, NamesTheStageInWhichTheDeadlinePassed) {
  const auto message_at = [](LegMode mode, Point point, Role failing) {
    TwoLegs legs = request_at(mode, point, 2);
    const LegFault late = fault(ErrorKind::kDeadlineExceeded);
    const LegActions actions = failing == P ? legs.prefill_failed(late) : legs.decode_failed(late);
    return std::get<EmitEvent>(actions.back()).event.error->message;
  };
  EXPECT_EQ(message_at(kPush, Point::kDecodeAsked, D),
            "the request's deadline passed while the decode worker reserved KV blocks");
  EXPECT_EQ(message_at(kPush, Point::kPrefillAsked, P),
            "the request's deadline passed while the prefill worker computed the prompt");
  EXPECT_EQ(message_at(kPush, Point::kPrefillAsked, D),
            "the request's deadline passed while the prefill worker computed the prompt");
  EXPECT_EQ(message_at(kPull, Point::kDecodeFetching, D),
            "the request's deadline passed while the decode worker waited for KV blocks");
  EXPECT_EQ(message_at(kPlain, Point::kStreaming, D),
            "the request's deadline passed while the decode worker computed the answer");
}

TEST(TwoLegs, TreatsAWorkerThatBreaksTheProtocolAsFailed) {
  TwoLegs early = request_at(LegMode::kPush, Point::kDecodeAsked, 0);
  EXPECT_EQ(describe(early.decode_event(tokens_event())), "cancel-decode error:internal");
  TwoLegs twice = request_at(LegMode::kPush, Point::kPrefillAsked, 0);
  EXPECT_EQ(describe(twice.decode_reserved(kAddress)), "cancel-decode cancel-prefill error:internal");
  TwoLegs unasked = request_at(LegMode::kPlain, Point::kDecodeAsked, 0);
  EXPECT_EQ(describe(unasked.decode_reserved(kAddress)), "cancel-decode error:internal");
  TwoLegs silent = request_at(LegMode::kPull, Point::kDecodeAsked, 0);
  EXPECT_EQ(describe(silent.prefill_done("")), "error:internal");
}

}  // namespace
}  // namespace tandem::router
