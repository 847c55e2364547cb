#include "src/router/two_legs.h"

#include <utility>

#include "src/base/check.h"

namespace tandem::router {
namespace {

// What decode is asked in a push: to reserve blocks and give its address.
constexpr const char* kReserveForPush = R"({"do_remote_decode":false,"do_remote_prefill":true,"transfer_mode":"push"})";
// What prefill is asked in a pull: vLLM's object, word for word.
constexpr const char* kPublishForPull =
    R"({"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,)"
    R"("remote_host":null,"remote_port":null})";

engine::TokenEvent error_event(Error error) {
  engine::TokenEvent event;
  event.error = std::move(error);
  return event;
}

}  // namespace

bool is_worker_fault(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kUnavailable:
    case ErrorKind::kDataLoss:
    case ErrorKind::kInternal:
      return true;
    case ErrorKind::kInvalidArgument:
    case ErrorKind::kNotFound:
    case ErrorKind::kTooLarge:
    case ErrorKind::kUnauthenticated:
    case ErrorKind::kResourceExhausted:
    case ErrorKind::kDeadlineExceeded:
    case ErrorKind::kAborted:
    case ErrorKind::kUnsupported:
      break;
  }
  return false;
}

bool is_misfit(ErrorKind kind, LegMode mode) { return kind == ErrorKind::kUnsupported && mode != LegMode::kPlain; }

LegActions TwoLegs::start() {
  CHECK_EQ(attempts_, 0);
  return {PickWorkers{}};
}

LegActions TwoLegs::picked(const Attempt& attempt) {
  CHECK(!is_answered_ && !decode_active_ && !prefill_active_);
  CHECK_EQ(attempt.prefill.has_value(), attempt.mode != LegMode::kPlain);
  CHECK(attempt.mode == LegMode::kPlain || (!has_emitted_ && given_.empty()));
  CHECK(unread_.empty());
  ++attempts_;
  attempt_ = attempt;
  prefill_started_ = false;
  if (attempt.mode == LegMode::kPull) {
    prefill_active_ = prefill_started_ = true;
    return {StartPrefill{*attempt.prefill, kPublishForPull}};
  }
  decode_active_ = true;
  return {StartDecode{attempt.decode, attempt.mode == LegMode::kPush ? kReserveForPush : given_}};
}

LegActions TwoLegs::none_available(Error error) {
  CHECK(!is_answered_ && !decode_active_ && !prefill_active_);
  is_answered_ = true;
  // After a failed attempt, what went wrong there tells more than that nobody else is left.
  return {EmitEvent{error_event(last_error_ ? std::move(*last_error_) : std::move(error))}};
}

LegActions TwoLegs::decode_reserved(std::string transfer) {
  if (!decode_active_ || is_answered_) return {};
  if (attempt_.mode != LegMode::kPush || prefill_started_ || has_emitted_) {
    return fail(Role::kDecode, {make_error(ErrorKind::kInternal,
                                           "the decode worker sent kv_transfer_params that were not asked for")});
  }
  prefill_active_ = prefill_started_ = true;
  return {StartPrefill{*attempt_.prefill, std::move(transfer)}};
}

LegActions TwoLegs::decode_event(engine::TokenEvent event) {
  if (!decode_active_ || is_answered_) return {};
  if (attempt_.mode == LegMode::kPush && !prefill_started_) {
    return fail(Role::kDecode,
                {make_error(ErrorKind::kInternal, "the decode worker sent tokens before it reserved KV blocks")});
  }
  has_emitted_ = true;
  unread_.clear();
  if (!event.tokens.empty()) deaths_ = 0;  // what got further than before did not kill
  if (event.finish) {
    // Prefill has handed everything over; its own answer is on the way and may come later.
    is_answered_ = true;
    decode_active_ = false;
  }
  LegActions actions;
  actions.emplace_back(EmitEvent{std::move(event)});
  return actions;
}

LegActions TwoLegs::decode_failed(LegFault fault) {
  if (!decode_active_) return {};
  decode_active_ = false;
  if (is_answered_) return {};
  return fail(Role::kDecode, std::move(fault));
}

LegActions TwoLegs::prefill_done(std::string transfer) {
  if (!prefill_active_) return {};
  prefill_active_ = false;
  if (is_answered_ || attempt_.mode == LegMode::kPush) return {};
  if (transfer.empty()) {
    return fail(Role::kPrefill, {make_error(ErrorKind::kInternal,
                                            "the prefill worker answered without kv_transfer_params; start it "
                                            "with --kv-transfer-config")});
  }
  decode_active_ = true;
  unread_ = transfer;
  return {StartDecode{attempt_.decode, std::move(transfer)}};
}

LegActions TwoLegs::prefill_failed(LegFault fault) {
  if (!prefill_active_) return {};
  prefill_active_ = false;
  // Decode's first token comes from prefill after the last block, so once it is there prefill has done its part.
  if (is_answered_ || has_emitted_) return {};
  return fail(Role::kPrefill, std::move(fault));
}

LegActions TwoLegs::deadline_passed() {
  if (!is_answered_) {
    return fail(decode_active_ || !prefill_active_ ? Role::kDecode : Role::kPrefill,
                {make_error(ErrorKind::kDeadlineExceeded, "the request's deadline passed")});
  }
  LegActions actions;
  stop_legs(actions);
  return actions;
}

LegActions TwoLegs::cancel() {
  LegActions actions;
  stop_legs(actions);
  is_answered_ = true;
  return actions;
}

bool TwoLegs::is_handing_over() const {
  if (has_emitted_ || attempt_.mode == LegMode::kPlain || !prefill_started_) return false;
  return decode_active_;
}

LegActions TwoLegs::fail(Role role, LegFault fault) {
  Error& error = fault.error;
  if (is_misfit(error.kind, attempt_.mode)) {
    error = make_error(ErrorKind::kUnavailable, "two workers do not fit together: {}", error.message);
  }
  if (error.kind == ErrorKind::kDeadlineExceeded) {
    error.message = fmt::format("the request's deadline passed while {}", stage(role));
  }
  LegActions actions;
  stop_legs(actions);
  if (error.code == engine::kNoRoom && !has_emitted_ && !std::exchange(was_without_room_, true)) {
    last_error_ = std::move(error);
    actions.emplace_back(PickWorkers{.without_transfer = true});
    return actions;
  }
  if (fault.died) ++deaths_;
  int& left = has_emitted_ ? repeats_.migrations : repeats_.retries;
  if (left == 0 || deaths_ >= kMaxDeaths || !is_worker_fault(error.kind)) {
    is_answered_ = true;
    if (deaths_ >= kMaxDeaths) {
      error.message =
          fmt::format("{} workers in a row went away with this request in their hands; it is not tried again", deaths_);
    }
    actions.emplace_back(EmitEvent{error_event(std::move(error))});
    return actions;
  }
  --left;
  last_error_ = std::move(error);
  actions.emplace_back(PickWorkers{.resumes = has_emitted_});
  return actions;
}

const char* TwoLegs::stage(Role failed) const {
  if (has_emitted_) return "the decode worker computed the answer";
  if (attempt_.mode == LegMode::kPlain) return "the worker computed the prompt";
  // Both legs have the same deadline; decode only waits while prefill is at work.
  if (failed == Role::kPrefill || prefill_active_) return "the prefill worker computed the prompt";
  if (attempt_.mode == LegMode::kPush && !prefill_started_) return "the decode worker reserved KV blocks";
  return "the decode worker waited for KV blocks";
}

void TwoLegs::stop_legs(LegActions& actions) {
  if (decode_active_) actions.emplace_back(CancelDecode{});
  if (prefill_active_) actions.emplace_back(CancelPrefill{});
  decode_active_ = prefill_active_ = false;
  release_publication(actions);
}

void TwoLegs::release_publication(LegActions& actions) {
  if (unread_.empty()) return;
  actions.emplace_back(ReleasePublication{*attempt_.prefill, std::exchange(unread_, {})});
}

}  // namespace tandem::router
