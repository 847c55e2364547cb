// The life of one request through a decode worker and, with prefill workers, a prefill worker: pure, events in and
// actions out. RouterCore owns one for each request; tests drive it by hand.
//
//   plain: decode alone computes the prompt.
//   push:  decode is asked first; its first event carries its address, which goes to prefill verbatim; prefill sends
//          the KV blocks and the first token to decode, whose stream is the answer.
//   pull:  prefill is asked first; its answer carries an address, which goes to decode verbatim; decode fetches.
//   given: the caller has said what the transfer is, which goes to decode verbatim; another router has the other leg, so
//          nothing is repeated here, and plain otherwise.
//
// What holds in every state:
//  - exactly one terminal event (finish or error) is emitted, unless cancelled, and none after it;
//  - when one leg fails the other is cancelled in the same step, and the failed leg's error is the answer;
//  - a publication (pull) whose attempt ends before decode has shown that it read it, by its first event, is released
//    in the same step: nobody else comes for it;
//  - an attempt is repeated with new handles and only when the worker is at fault; a caller's fault, a full queue or a
//    passed deadline is never repeated, nor a request during which two workers died without a token in between (it may
//    have killed them);
//  - once something has been emitted, decode alone goes on behind it (migration): nothing is emitted twice.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "src/base/result.h"
#include "src/engine/worker.h"
#include "src/router/registry.h"

namespace tandem::router {

enum class LegMode : uint8_t { kPlain, kPush, kPull };

// Choose workers, then call picked() or none_available().
struct PickWorkers {
  bool resumes = false;  // behind the tokens emitted so far: decode alone, LegMode::kPlain
  bool without_transfer = false;  // a worker has no room for one: LegMode::kPlain; not a repeat
};
// Who does it, and how; `prefill` is given unless the mode is kPlain.
struct Attempt {
  LegMode mode = LegMode::kPlain;
  WorkerId decode;
  std::optional<WorkerId> prefill{};
};
// What may be done besides the first attempt.
struct Repeats {
  int retries = 2;     // while nothing has been emitted
  int migrations = 0;  // afterwards
};
// How a leg ended badly.
struct LegFault {
  Error error;
  bool reached = true;  // the worker answered
  bool died = false;    // it went away with the request in its hands
};
// `transfer` is the kv_transfer_params object for the leg as JSON text; "" sends none.
struct StartDecode {
  WorkerId worker;
  std::string transfer;
};
struct StartPrefill {
  WorkerId worker;
  std::string transfer;
};
struct CancelDecode {};
struct CancelPrefill {};
// Nobody fetches what this prefill worker has published: `transfer` is the kv_transfer_params object of its answer.
struct ReleasePublication {
  WorkerId worker;
  std::string transfer;
};
struct EmitEvent {
  engine::TokenEvent event;
};
using LegAction = std::variant<PickWorkers, StartDecode, StartPrefill, CancelDecode, CancelPrefill, ReleasePublication,
                               EmitEvent>;
using LegActions = std::vector<LegAction>;

class TwoLegs {
 public:
  static constexpr int kMaxDeaths = 2;

  // `given` is the caller's own kv_transfer_params, "" for none.
  explicit TwoLegs(Repeats repeats, std::string given = "")
      : repeats_(given.empty() ? repeats : Repeats{0, 0}), given_(std::move(given)) {}

  LegActions start();
  LegActions picked(const Attempt& attempt);
  LegActions none_available(Error error);

  // Decode's stream. A reservation is the address of a push, once, before any token.
  LegActions decode_reserved(std::string transfer);
  LegActions decode_event(engine::TokenEvent event);  // tokens or finish
  LegActions decode_failed(LegFault fault);
  // Prefill's answer; `transfer` is the address of a pull, "" if it gave none.
  LegActions prefill_done(std::string transfer);
  LegActions prefill_failed(LegFault fault);
  // The request's time is up, and its legs have not said so. Ends whatever is left.
  LegActions deadline_passed();
  // The client has left.
  LegActions cancel();

  const Attempt& attempt() const { return attempt_; }
  // Decode holds blocks for a prefill that is under way: a failure now may be one of the way between the two.
  bool is_handing_over() const;
  bool has_emitted() const { return has_emitted_; }
  // The terminal event has been emitted or the request was cancelled.
  bool is_answered() const { return is_answered_; }
  // Nothing is left to do. A prefill leg may end after the answer.
  bool is_closed() const { return is_answered_ && !decode_active_ && !prefill_active_; }
  int attempts() const { return attempts_; }

 private:
  LegActions fail(Role role, LegFault fault);
  const char* stage(Role failed) const;  // what the attempt was doing, for messages
  void stop_legs(LegActions& actions);
  void release_publication(LegActions& actions);

  Repeats repeats_;  // left
  const std::string given_;
  Attempt attempt_;
  int attempts_ = 0;
  int deaths_ = 0;  // since the last token
  bool decode_active_ = false;
  bool prefill_active_ = false;
  bool prefill_started_ = false;  // in this attempt
  std::string unread_;            // what its prefill published and decode has not shown to have read; "": nothing
  bool has_emitted_ = false;
  bool is_answered_ = false;
  bool was_without_room_ = false;
  std::optional<Error> last_error_;
};

// Of a leg in a hand-over also: the two workers may not fit together (models, KV layouts), and others may.
bool is_misfit(ErrorKind kind, LegMode mode);
// May another worker do better? True for faults of a worker or of the way to it.
bool is_worker_fault(ErrorKind kind);

}  // namespace tandem::router
