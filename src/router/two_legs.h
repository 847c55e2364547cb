// The life of one request through a decode worker and, with prefill workers, a prefill worker: pure, events in and
// actions out. RoutedWorker binds it to sockets; tests and simulation drive it by hand.
//
//   plain: decode alone computes the prompt.
//   push:  decode is asked first; its first event carries its address, which goes to prefill verbatim; prefill sends
//          the KV blocks and the first token to decode, whose stream is the answer.
//   pull:  prefill is asked first; its answer carries an address, which goes to decode verbatim; decode fetches.
//
// What holds in every state:
//  - exactly one terminal event (finish or error) is emitted, unless cancelled, and none after it;
//  - when one leg fails the other is cancelled in the same step, and the failed leg's error is the answer;
//  - an attempt is repeated only while nothing has been emitted, on other workers, with new handles, and only when
//    the worker is at fault; a caller's fault, a full queue or a passed deadline is never repeated.
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
  bool needs_prefill = false;
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
struct EmitEvent {
  engine::TokenEvent event;
};
using LegAction = std::variant<PickWorkers, StartDecode, StartPrefill, CancelDecode, CancelPrefill, EmitEvent>;
using LegActions = std::vector<LegAction>;

class TwoLegs {
 public:
  // `max_retries` further attempts after the first.
  TwoLegs(LegMode mode, int max_retries) : mode_(mode), retries_left_(max_retries) {}

  LegActions start();
  LegActions picked(WorkerId decode, std::optional<WorkerId> prefill);
  LegActions none_available(Error error);

  // Decode's stream. A reservation is the address of a push, once, before any token.
  LegActions decode_reserved(std::string transfer);
  LegActions decode_event(engine::TokenEvent event);  // tokens or finish
  LegActions decode_failed(Error error);
  // Prefill's answer; `transfer` is the address of a pull, "" if it gave none.
  LegActions prefill_done(std::string transfer);
  LegActions prefill_failed(Error error);
  // The client has left.
  LegActions cancel();

  // Workers that failed this request; not to be picked again.
  const std::vector<WorkerId>& excluded() const { return excluded_; }
  bool has_emitted() const { return has_emitted_; }
  // The terminal event has been emitted or the request was cancelled.
  bool is_answered() const { return is_answered_; }
  // Nothing is left to do. A prefill leg may end after the answer.
  bool is_closed() const { return is_answered_ && !decode_active_ && !prefill_active_; }
  int attempts() const { return attempts_; }

 private:
  LegActions fail(Role role, Error error);
  const char* stage(Role failed) const;  // what the attempt was doing, for messages
  void stop_legs(LegActions& actions);

  LegMode mode_;
  int retries_left_;
  int attempts_ = 0;
  WorkerId decode_{-1};
  WorkerId prefill_{-1};
  bool decode_active_ = false;
  bool prefill_active_ = false;
  bool prefill_started_ = false;  // in this attempt
  bool has_emitted_ = false;
  bool is_answered_ = false;
  std::optional<Error> last_error_;
  std::vector<WorkerId> excluded_;
};

// May another worker do better? True for faults of a worker or of the way to it.
bool is_worker_fault(ErrorKind kind);

}  // namespace tandem::router
